"""The demo's closing report: report.json for programs, report.html for people, and a text for the terminal."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.banking77.compare import Agreement

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2128; max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.lead { color: #57606a; margin-top: 0 }
table.figures { margin: 1.4rem 0 } .figures td:first-child { color: #57606a } .figures td { white-space: normal }
.figures tr:first-child td { font-size: 1.35rem; font-weight: 600; color: inherit }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #eaeef2; white-space: nowrap }
th { color: #57606a; font-weight: 600 } td:first-child, th:first-child { text-align: left }
img { width: 100%; max-width: 46rem } code { background: #f6f8fa; padding: .1rem .3rem; border-radius: .25rem }
.scroll { overflow-x: auto }
"""


def write_page(output: Path, reference: dict[str, Any] | None, agreement: Agreement, seconds: float) -> str:
    """Write report.json and report.html into ``output``; returns the text for the terminal.

    Args:
        output: folder of the demo; its ``run/`` holds the coordinator's own report.
        reference: stored accuracies of the other arms; None if they do not apply to these settings.
        agreement: how the peft adapter agrees with the runtime.
        seconds: time the demo has taken so far, set-up not counted.
    """
    run = json.loads((output / "run" / "report.json").read_text())["run"]
    rounds = run["rounds"]
    report: dict[str, Any] = {
        "accuracy": next(r["accuracy"] for r in reversed(rounds) if r["accuracy"] is not None),
        "reference_accuracy": None,
        "head_only_accuracy": None,
        "gain_kept": None,
        "rounds": run["rounds_committed"],
        "seconds": round(seconds, 1),
        "predicted_peak_bytes": _largest(rounds, "predicted_peak_bytes"),
        "measured_peak_bytes": _largest(rounds, "measured_peak_bytes"),
        "bytes_up": sum(r["bytes_up"] for r in rounds),
        "bytes_down": sum(r["bytes_down"] for r in rounds),
        "peft_agreement": agreement.agreement,
        "peft_accuracy": agreement.peft_accuracy,
        "adapter": str(output / "adapter"),
    }
    if reference is not None:
        report.update(_compared(report["accuracy"], reference))
    _draw_curve(output / "curve.svg", run, reference)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "report.html").write_text(_page(report, rounds), encoding="utf-8")
    return _text(report, output)


def _draw_curve(path: Path, run: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Dev accuracy after each evaluated round, beside the stored arms."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    measured = [(r["round"] + 1, r["accuracy"]) for r in run["rounds"] if r["accuracy"] is not None]
    axes.plot(
        *zip((0, run["initial_accuracy"]), *measured, strict=True),
        "o-",
        label="forward mode, this run",
        zorder=3,
    )
    for name, style in (("backpropagation", "s--"), ("head_only", "^:")) if reference else ():
        points = (
            [(point["round"] + 1, point["accuracy"]) for point in reference[name]["curve"]]
            if reference
            else []
        )
        axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), markersize=4)
    axes.set(xlabel="committed rounds", ylabel="dev accuracy", ylim=(0, 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def _compared(accuracy: float, reference: dict[str, Any]) -> dict[str, Any]:
    backprop, head_only = reference["backpropagation"]["accuracy"], reference["head_only"]["accuracy"]
    gain = backprop - head_only
    return {
        "reference_accuracy": backprop,
        "head_only_accuracy": head_only,
        "backpropagation_gain": gain,
        "gain_kept": (accuracy - head_only) / gain if gain > 0 else None,
        "reference_command": reference["command"],
    }


def _largest(rounds: list[dict[str, Any]], name: str) -> int:
    return max(r[name] for r in rounds if r[name] is not None)


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The closing figures as (name, value)."""
    lines = [("accuracy on 1,000 dev rows", f"{report['accuracy']:.1%} (chance is 1.3%)")]
    if report["reference_accuracy"] is not None:
        gain = report["backpropagation_gain"]
        kept = "no gain to keep" if report["gain_kept"] is None else f"{report['gain_kept']:.0%}"
        lines += [
            ("head only, same rounds, data, seeds", f"{report['head_only_accuracy']:.1%}"),
            ("backpropagation on the same slices", f"{report['reference_accuracy']:.1%}"),
            ("of backpropagation's gain, kept", f"{kept} of {100 * gain:+.1f} points"),
        ]
    return [
        *lines,
        ("rounds", str(report["rounds"])),
        ("seconds, export included", f"{report['seconds']:.0f}"),
        ("bytes up / down", f"{report['bytes_up'] / 1e6:.1f} MB / {report['bytes_down'] / 1e6:.1f} MB"),
        (
            "peak memory of a worker, predicted / measured",
            f"{report['predicted_peak_bytes'] / 1e6:.0f} MB / {report['measured_peak_bytes'] / 1e6:.0f} MB",
        ),
        (
            "peft adapter on the float model",
            f"{report['peft_accuracy']:.1%}, agrees with the runtime on {report['peft_agreement']:.1%}",
        ),
    ]


def _text(report: dict[str, Any], output: Path) -> str:
    lines = _lines(report)
    width = max(len(name) for name, _ in lines)
    figures = [f"   {name.ljust(width)}  {value}" for name, value in lines]
    places = [
        f"   {'learning curve'.ljust(width)}  {output / 'curve.svg'}",
        f"   {'page'.ljust(width)}  {output / 'report.html'}",
        f"   {'adapter'.ljust(width)}  {report['adapter']}",
    ]
    return "\n" + "\n".join([*figures, *places])


def _page(report: dict[str, Any], rounds: list[dict[str, Any]]) -> str:
    figures = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in _lines(report)
    )
    head = (
        "round",
        "accuracy",
        "dev loss",
        "training loss",
        "up",
        "down",
        "seconds",
        "predicted",
        "measured",
    )
    header = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in _cells(r)) + "</tr>" for r in rounds)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>banking77 by forward mode</title><style>{STYLE}</style></head>
<body><h1>banking77 by forward mode</h1>
<p class="lead">A quantised all-MiniLM-L6-v2, fine-tuned by devices that never backpropagate.</p>
<table class="figures">{figures}</table>
<h2>Learning curve</h2><img src="curve.svg" alt="dev accuracy by round">
<h2>Rounds</h2><div class="scroll"><table><tr>{header}</tr>{body}</table></div>
<h2>Adapter</h2><p>LoRA factors for <code>peft</code>: <code>{html.escape(report["adapter"])}</code></p>
</body></html>
"""


def _cells(r: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
        return "–" if value is None else format(value * scale, form) + unit

    return [
        str(r["round"]) if r["state"] == "committed" else f"{r['round']} {r['state']}",
        number(r["accuracy"], ".1f", 100, " %"),
        number(r["loss"], ".3f"),
        number(r["train_loss"], ".3f"),
        number(r["bytes_up"], ".2f", 1e-6, " MB"),
        number(r["bytes_down"], ".2f", 1e-6, " MB"),
        number(r["seconds"], ".1f"),
        number(r["predicted_peak_bytes"], ".0f", 1e-6, " MB"),
        number(r["measured_peak_bytes"], ".0f", 1e-6, " MB"),
    ]
