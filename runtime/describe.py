"""A plan as text and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusegen.runtime.specialize import describe

if TYPE_CHECKING:
    from fusegen.runtime.plan import Plan, Step

MIB = 1 << 20


def text(plan: Plan) -> str:
    """A summary, then a row for each node that moves memory, then what declined and why."""
    rows = [s for s in plan.steps if s.binding.how != "view"]
    lines = [*_summary(plan), "", f"{'node':<36} {'bound to':<44} {'output':<28} {'MFLOP':>9} {'MiB':>8} phase"]
    for step in rows:
        out = describe(step.outputs[0]) if step.outputs else ""
        mark = "" if step.binding.invariant else " *"
        bound = f"{step.binding.how} {step.binding.name}{' by sample' if step.binding.by_sample else ''}{mark}"
        work = f"{step.flops / 1e6:>9.2f} {step.bytes / MIB:>8.3f} {step.phase}"
        lines.append(f"{step.node.name[:36]:<36} {bound[:44]:<44} {out[:28]:<28} {work}")
        lines += [f"{'':<36} declined {d.kernel}: {d.reason}" for d in step.binding.declined]
    return "\n".join(lines)


def _summary(plan: Plan) -> list[str]:
    steps = plan.steps
    inputs = ", ".join(f"{k} {describe(v)}" for k, v in plan.program.inputs.items())
    varying = sum(not s.binding.invariant for s in steps)
    phases = {p: sum(s.phase == p for s in steps) for p in dict.fromkeys(s.phase for s in steps)}
    out = [
        f"{plan.program.name} on {plan.backend}: {inputs}",
        f"{len(steps)} nodes, {sum(s.flops for s in steps) / 1e9:.3f} GFLOP; "
        f"arena {plan.layout.peak / MIB:.2f} MiB, largest live set {plan.layout.live / MIB:.2f} MiB",
        "nodes by phase: " + ", ".join(f"{k} {v}" for k, v in phases.items()),
        "rewrites: " + (", ".join(f"{a.rule} {a.count}" for a in plan.applied if a.count) or "none"),
        "bound: " + ", ".join(f"{name} {count}" for name, count in plan.counts().items()),
    ]
    if varying:
        out.append(f"* {varying} nodes may give a sample other bits in another batch; deterministic=True avoids that")
    return [*out, *(f"note: {n}" for n in plan.notes)]


def document(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for JSON."""
    return {
        "program": plan.program.name,
        "backend": plan.backend,
        "device": plan.device,
        "deterministic": plan.deterministic,
        "inputs": {k: describe(v) for k, v in plan.program.inputs.items()},
        "arena_bytes": plan.layout.peak,
        "live_bytes": plan.layout.live,
        "notes": list(plan.notes),
        "applied": [{"rule": a.rule, "count": a.count, "left": list(a.left)} for a in plan.applied],
        "steps": [_row(plan, s) for s in plan.steps],
    }


def _row(plan: Plan, step: Step) -> dict[str, Any]:
    binding = step.binding
    return {
        "node": step.node.name,
        "op": step.node.op,
        "source": step.node.source,
        "how": binding.how,
        "binding": binding.name,
        "declined": [{"kernel": d.kernel, "reason": d.reason} for d in binding.declined],
        "invariant": binding.invariant,
        "by_sample": list(binding.by_sample),
        "phase": step.phase,
        "depends": list(step.depends),
        "outputs": [describe(o) for o in step.outputs],
        "offset": plan.layout.offsets.get(step.node.outputs[0]) if step.node.outputs else None,
        "bytes": step.bytes,
        "flops": step.flops,
    }
