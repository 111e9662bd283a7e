"""The runtime: programs are read, rewritten, planned and run; nothing here knows a model family."""

if __name__ != "fusegen.runtime":
    raise ImportError(f"import {__name__!r} as 'fusegen.runtime'")
