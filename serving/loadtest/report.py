"""A measurement in words."""

from __future__ import annotations

from collections.abc import Sequence

from serving.loadtest.measure import Load
from serving.loadtest.request import Request
from serving.loadtest.search import Found, Step
from serving.loadtest.slo import Check
from serving.loadtest.summary import Summary


def heading(request: Request, load: Load, processes: int) -> str:
    sent_by = f"{processes} process{'es' if processes > 1 else ''}"
    what = f"{request.method} {request.target.url}"
    return f"{what}: {load.rate:,.4g}/s for {load.duration:g} s, {load.arrivals} arrivals, {sent_by}"


def lines(summary: Summary) -> list[str]:
    """The figures, a line a matter."""
    cut = " (interrupted: the report so far)" if summary.interrupted else ""
    found = [
        f"requests   {summary.sent:,} in {summary.seconds:.4g} s{cut}, {summary.right:,} right answers, "
        f"{_errors(summary)}",
        f"rate       {summary.sent_rps:,.1f}/s due, {summary.answered_rps:,.1f}/s answered, "
        f"at most {summary.most_in_flight:,} in flight",
    ]
    found += [f"           {kind}: {text}" for kind, text in summary.examples.items() if kind in summary.errors]
    values = summary.latency_ms
    text = "  ".join(f"{key} {ms(value)}" for key, value in values.items()) if values else "no answer"
    found.append(f"latency    {text}{' ms' if values else ''}")
    lag = "  ".join(f"{key} {ms(summary.lag_ms[key])}" for key in ("p50", "p99", "max") if key in summary.lag_ms)
    found.append(f"generator  lag {lag or '–'} ms, {summary.cpu:.0%} of a core")
    if summary.invalid:
        found.append(
            f"INVALID    the generator was the bottleneck ({summary.invalid}): "
            "give more --processes, or a quieter machine"
        )
    return found


def verdict(file: str, checks: Sequence[Check]) -> str:
    broken = [str(check) for check in checks if not check.ok]
    held = [str(check) for check in checks if check.ok]
    return f"slo        {file}: " + (f"BROKEN: {'; '.join(broken)}" if broken else f"held: {'; '.join(held)}")


def step_line(step: Step) -> str:
    values = step.summary.latency_ms or {}
    latency = ", ".join(f"{key} {ms(values[key])} ms" for key in ("p50", "p95", "p99") if key in values)
    outcome = "holds" if step.holds else "; ".join([*step.broken, step.summary.invalid or ""]).strip("; ")
    return f"{step.rate:>9,.4g}/s  {latency or 'no answer'}, {step.summary.error_rate:.2%} errors: {outcome}"


def found_line(found: Found) -> str:
    why = f" ({found.limit})" if found.limit else ""
    if found.best is None:
        return f"no rate held the objectives{why}"
    return f"highest rate within the objectives: {found.best.rate:,.4g}/s{why}"


def ms(value: float) -> str:
    """Milliseconds with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _errors(summary: Summary) -> str:
    if not summary.errors:
        return "no error"
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in summary.errors.items())
    return f"{summary.error_rate:.2%} errors: {kinds}"
