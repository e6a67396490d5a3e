"""`report.html`: a run on one page that needs no other file, no network and no script, made from what lies on disk.

Everything that a run wrote (names, settings, samples) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from fastrl.report.curves import evaluation_svg, panel_svg, panels_figure, plot_curves, save
from fastrl.report.panels import SUBJECTS, Panel, panels_of, split_prefix
from fastrl.report.runs import Change, Run, read_run
from fastrl.run_files import REPORT_FOLDER, message_text

_TITLES = {
    "reward": "Reward",
    "preference": "Preference",
    "policy": "Policy",
    "value": "Value function",
    "completions": "Completions",
    "loss": "Loss",
    "optimizer": "Optimizer",
    "speed": "Speed",
    "other": "Other metrics",
}

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2430; --dim: #5b6675; --line: #dfe4ea; --card: #f6f8fa;
  --accent: #0072b2; --warn: #fff4de; --warn-line: #e0a53a; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e4e8ee; --dim: #9aa5b4; --line: #2d343d;
  --card: #1c2229; --accent: #56b4e9; --warn: #332a17; --warn-line: #8a6a28; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; color: var(--dim); font-weight: 600; }
.sub, footer { color: var(--dim); margin: .2rem 0; } footer { margin-top: 3rem; font-size: .85rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0; padding: .5rem 0;
  border-block: 1px solid var(--line); }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .7rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.1rem; } .card span { color: var(--dim); font-size: .82rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: .7rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .4rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--dim); font: .72rem ui-monospace, monospace; padding: .1rem .3rem; }
.evaluations figure { max-width: 34rem; } .evaluations pre { overflow-x: auto; white-space: pre; }
svg * { stroke-linejoin: round; stroke-linecap: butt; } svg text { font-family: system-ui, sans-serif; }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .8rem; margin: .5rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; white-space: nowrap; } td.number { font-variant-numeric: tabular-nums; }
.pairs table { width: auto; } td.name { white-space: nowrap; padding-right: 2rem; }
.samples td.text:nth-child(-n+2) { min-width: 14rem; }
.text div { white-space: pre-wrap; max-height: 16em; overflow-y: auto; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem;
  white-space: pre-wrap; font-size: .88rem; } code, pre { font-family: ui-monospace, monospace; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
@media print { nav { display: none; } .text div { max-height: none; } }
"""


def write_page(run_folder: str | Path) -> list[Path]:
    """Write `report/report.html` into a run's folder, and beside it `curves.png` and a PNG per subject.

    Returns:
        The files, the page first.

    Raises:
        NotARunError: the folder holds no metrics of a run.
        OSError: it can't be written.
    """
    run = read_run(run_folder)
    folder = run.folder / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [plot_curves(run.history, folder / "curves.png", title=run.name)]
    for subject, panels in _by_subject(run).items():
        figure = panels_figure(run.history, panels, f"{run.name}: {_TITLES[subject].lower()}")
        pictures.append(save(figure, folder / f"curves_{subject}.png"))
    page = folder / "report.html"
    page.write_text(page_html(run), encoding="utf-8")
    return [page, *pictures]


def page_html(run: Run) -> str:
    """The whole page."""
    sections = {
        "Summary": _summary(run),
        "Curves": _curves(run),
        "Evaluation": _evaluations(run),
        "Answers": _answers(run.answers()),
        "Samples": _samples(run),
        "Configuration": _configuration(run),
        "Versions": _versions(run),
        "Reproduce": _reproduce(run),
    }
    shown = {title: content for title, content in sections.items() if content}
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in shown)
    body = "".join(
        f'<section id="{title.lower()}"><h2>{title}</h2>{content}</section>\n' for title, content in shown.items()
    )
    facts = [run.facts.get("method"), run.facts.get("model"), run.status]
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)}</title><style>{_STYLE}</style></head>\n<body>\n<header><h1>{escape(run.name)}</h1>"
        f'<p class="sub">{escape(" · ".join(str(fact) for fact in facts if fact))}</p></header>\n<nav>{links}</nav>\n'
        f"{body}<footer>Made by fastrl from {escape(str(run.folder))}, {made}.</footer>\n</body></html>\n"
    )


def _by_subject(run: Run) -> dict[str, list[tuple[Panel, list[str]]]]:
    panels = panels_of(run.metrics)
    return {name: found for name in SUBJECTS if (found := [item for item in panels if item[0].subject == name])}


def _summary(run: Run) -> str:
    cards = [_change_card(change) for change in run.headline()]
    parameters = run.facts.get("parameters")
    if parameters:
        share = run.facts.get("trainable", parameters) / parameters
        cards.append(_card(_short(parameters), "parameters" + ("" if share == 1 else f", {share:.2%} trained")))
    tokens, seconds = run.total("num_tokens"), run.total("seconds")
    if tokens:
        cards.append(_card(_short(tokens), "tokens"))
    if seconds:
        cards.append(_card(_hours(seconds), "of training"))
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in run.warnings())
    return f'<div class="cards">{"".join(cards)}</div>{warnings}'


def _change_card(change: Change) -> str:
    logs = "first and last log" if change.logs == 1 else f"means of the first and the last {change.logs} logs"
    return _card(f"{change.first:.4g} → {change.last:.4g}", f"{change.metric}, {logs}")


def _card(value: str, label: str) -> str:
    return f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def _curves(run: Run) -> str:
    parts = []
    for subject, panels in _by_subject(run).items():
        drawn = "".join(_figure(run, panel, names) for panel, names in panels)
        parts.append(f'<h3>{_TITLES[subject]}</h3><div class="curves">{drawn}</div>')
    return "\n".join(parts)


def _figure(run: Run, panel: Panel, names: Sequence[str]) -> str:
    bases = dict.fromkeys(split_prefix(name)[1] for name in names)
    return f"<figure>{panel_svg(run.history, panel, names)}<figcaption>{escape(', '.join(bases))}</figcaption></figure>"


def _evaluations(run: Run) -> str:
    parts = []
    for place, evaluation in run.evaluations().items():
        parts.append(f"<figure>{evaluation_svg(evaluation, place)}</figure><pre>{escape(evaluation.table())}</pre>")
    return f'<div class="evaluations">{"".join(parts)}</div>' if parts else ""


def _answers(answers: Mapping[str, Any]) -> str:
    if not answers:
        return ""
    rows = zip(
        *(answers[key] for key in ("prompts", "before", "rewards_before", "after", "rewards_after")), strict=False
    )
    return _table(("prompt", "before", "reward", "after", "reward"), rows, "samples")


def _samples(run: Run) -> str:
    parts = []
    for title, rows in run.samples().items():
        names = [name for name in rows[0] if name != "step"] if rows else []
        cells = ([row[name] for name in names] for row in rows)
        parts.append(f"<h3>{escape(title)}</h3>{_table(names, cells, 'samples')}")
    return "".join(parts)


def _configuration(run: Run) -> str:
    arguments, changed = run.facts.get("arguments") or {}, run.facts.get("changed") or []
    settings = {name: value for name, value in (run.facts.get("settings") or {}).items() if value not in (None, "", [])}
    if not arguments:
        return ""
    first = {**settings, **{name: arguments.get(name) for name in changed}}
    rest = {name: value for name, value in arguments.items() if name not in first}
    return (
        f"{_pairs(first)}<details><summary>The others, at their defaults ({len(rest)})</summary>"
        f"{_pairs(dict(sorted(rest.items())))}</details>"
    )


def _versions(run: Run) -> str:
    versions = {name: version for name, version in (run.facts.get("versions") or {}).items() if version}
    machine: dict[str, Any] = {name: run.facts[name] for name in ("device", "processes") if name in run.facts}
    return _pairs({**versions, **machine}) if versions else ""


def _reproduce(run: Run) -> str:
    parts = []
    for start in run.facts.get("starts") or []:
        what = "started" if not start.get("step") else f"resumed at step {start['step']}"
        title = f"{what} {start.get('time', '')}, in {start.get('folder', '')}"
        parts.append(f"<h3>{escape(title)}</h3><pre>{escape(str(start.get('command', '')))}</pre>")
    return "".join(parts)


def _pairs(values: Mapping[str, Any]) -> str:
    rows = ((_Name(name), value) for name, value in values.items())
    return _table((), rows, "pairs") if values else ""


def _table(head: Sequence[str], rows: Iterable[Iterable[Any]], kind: str) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide {kind}"><table>{top}<tbody>{body}</tbody></table></div>'


class _Name(str):
    """The name of an argument or a package."""


def _cell(value: Any) -> str:
    if isinstance(value, _Name):
        return f'<td class="name"><code>{escape(value)}</code></td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value}</td>'
    text = "-" if value is None else message_text(value)
    return f'<td class="text"><div>{escape(text)}</div></td>'


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
