"""The profile document, filled from what was measured."""

from __future__ import annotations

from datetime import UTC, datetime

from edge_runtime.figures import duration
from edge_runtime.memory.plan import Work
from edge_runtime.profile.document import (
    Comparison,
    Measuring,
    Profile,
    TimelineSample,
    WorkRecord,
    thin,
)
from edge_runtime.profile.facts import FEWEST_CHECKED_STEPS, bins, growth, phase_peaks, step_seconds, tensors
from edge_runtime.profile.identity import identify
from edge_runtime.profile.measure import Observer, ProfileRun
from edge_runtime.profile.top_activations import top_activations_line
from edge_runtime.profile.what_if import edges, what_if, worst_case

#: Largest number of samples of the timeline in a report.
MOST_SAMPLES = 400


def fill_profile(run: ProfileRun, asked: Work, command: str, ways: list[Comparison]) -> Profile:
    """The report of a task that has ended, killed or not.

    Args:
        run: the profiled task.
        asked: the work as it was asked for, whatever the data allowed.
        command: command line that repeats the measurement.
        ways: other ways to do the same work.
    """
    plan, request, outcome, sampler = run.plan, run.request, run.outcome, run.observer
    steps = outcome.steps_applied + outcome.steps_skipped if outcome else 0
    kept = outcome.steps if outcome else ()
    phases = outcome.memory.phases if outcome else _sampled_peaks(sampler)
    peak_bytes = outcome.memory.high_water_bytes if outcome else max([1, *phases.values()])
    step_s = step_seconds(kept, steps)
    checked = growth(kept, steps)
    if checked is None and outcome is not None:
        run.notes.append(
            f"No leak check: it needs {FEWEST_CHECKED_STEPS} steps after the warm-up, so at least "
            f"{FEWEST_CHECKED_STEPS * 5 // 4} steps."
        )
    if (line := top_activations_line(run.planner, plan)) is not None:
        run.notes.append(line)
    samples = tuple(
        TimelineSample(s.seconds, s.phase, s.resident_bytes, s.anonymous_bytes, s.file_bytes)
        for s in sampler.samples
    )
    this = Comparison(
        "this task", peak_bytes, step_s, "killed by the kernel" if run.killed else "measured above"
    )
    return Profile(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        identity=identify(request.package, run.planner.arithmetic, command, request.engine),
        work=WorkRecord(
            batch_size=plan.work.batch_size,
            micro_batch=plan.choice.micro_batch,
            sequence=plan.work.sequence,
            draws=plan.work.draws,
            slices=plan.work.slices,
            weights=plan.choice.weights,
            steps=steps,
            threads=run.job.threads,
            gave_up=plan.gave_up,
            update=plan.work.update,
        ),
        cap_bytes=request.cap_bytes,
        peak_bytes=peak_bytes,
        charged_peak_bytes=_charged(run),
        enforced_by=run.enforced_by,
        enforcement_note=f"{run.enforcement_note[:1].upper()}{run.enforcement_note[1:]}."
        if run.enforcement_note
        else "",
        predicted_peak_bytes=plan.peak.total_bytes,
        bins=bins(plan.peak, outcome.bins if outcome else (), phases),
        timeline=thin(samples, MOST_SAMPLES),
        phases=phase_peaks(phases, sampler.entered_s, run.ended_s),
        tensors=tensors(run.planner, plan),
        what_if=what_if(run.planner, request.work, plan, request.cap_bytes),
        growth=checked,
        comparisons=(this, *ways),
        step_s=step_s,
        measuring=_measuring(sampler, steps),
        killed=run.killed is not None,
        notes=tuple(note[:1000] for note in run.notes),
        worst_case=worst_case(
            run.planner, asked, request.cap_bytes, max(0, peak_bytes - plan.peak.total_bytes)
        ),
        edges=edges(run.planner, plan, request.cap_bytes),
    )


def _sampled_peaks(sampler: Observer) -> dict[str, int]:
    """The largest sample of each phase, which is all that is known of a worker that was killed."""
    peaks: dict[str, int] = {}
    for sample in sampler.samples:
        peaks[sample.phase] = max(peaks.get(sample.phase, 0), sample.resident_bytes)
    return peaks


def _charged(run: ProfileRun) -> int | None:
    """The kernel's largest charge. A control group that killed the worker had been charged its whole cap."""
    if run.outcome is not None:
        return run.outcome.memory.cgroup_peak_bytes
    return run.request.cap_bytes if run.enforced_by in {"cgroup_v1", "cgroup_v2"} else None


def _measuring(sampler: Observer, steps: int) -> Measuring:
    inside = (
        f" The worker looks at itself as briefly after each of {steps} steps, and at all its mappings in the first "
        "step, which is not timed."
    )
    return Measuring(
        samples=sampler.looks,
        seconds=sampler.looks * sampler.look_s,
        note=f"One look at the worker from outside takes {duration(sampler.look_s)}.{inside if steps else ''}",
    )
