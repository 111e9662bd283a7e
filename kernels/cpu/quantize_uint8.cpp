// levels: scalar avx2 avx512 neon
// Images to uint8, each sample by its own scale and zero point; see image_codes.h.
//
// A sample's elements are one run of memory, taken in pieces: a first pass finds the extremes, which no order changes,
// a second one makes the codes.
#include "image_codes.h"

namespace {

template <class T>
int quantize(const fg_quantize_uint8_args *a) {
  const T *x = static_cast<const T *>(a->x);
  uint8_t *codes = static_cast<uint8_t *>(a->codes);
  const Pieces pieces(a->elements);
  const size_t some = static_cast<size_t>(a->batch), ranges = some * static_cast<size_t>(pieces.each);
  Coding *codings = static_cast<Coding *>(fg_scratch(some * sizeof(Coding) + ranges * sizeof(Range)));
  if (!codings) return FG_NO_MEMORY;
  find_codings(x, a->batch, pieces, reinterpret_cast<Range *>(codings + a->batch), codings);
  for (int64_t b = 0; b < a->batch; ++b) {
    static_cast<float *>(a->scale)[b] = codings[b].scale;
    static_cast<int64_t *>(a->zero)[b] = codings[b].zero;
  }
  return parallel_for(a->batch * pieces.each, 1, [&](int64_t item) {
    const Coding &by = codings[item / pieces.each];
    const int64_t at = pieces.start(item);
    if (by.rate == 0.0f)
      memset(codes + at, 0, static_cast<size_t>(pieces.size(item)));
    else
      put_codes(x + at, pieces.size(item), by, codes + at);
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(quantize_uint8)(const fg_quantize_uint8_args *a) {
  if (!a->batch) return FG_OK;
  if (!a->elements) {
    memset(a->scale, 0, static_cast<size_t>(a->batch) * sizeof(float));
    memset(a->zero, 0, static_cast<size_t>(a->batch) * sizeof(int64_t));
    return FG_OK;
  }
  switch (a->dtype) {
    case FG_FLOAT32: return quantize<float>(a);
    case FG_BFLOAT16: return quantize<bf16>(a);
    case FG_FLOAT16: return quantize<fp16>(a);
    default: return FG_BAD_ARGUMENT;
  }
}
