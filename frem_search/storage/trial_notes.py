"""What Optuna's dashboard shows of a trial beside its numbers: a note, and files to look at.

The dashboard is not needed to write them: files are announced under Optuna's own key, the note under the dashboard's.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

CURVE = "learning_curve.csv"
PICTURE = "predictions.png"
SHOWN = {CURVE: "text/csv", PICTURE: "image/png"}
ARTIFACT_KEY = "artifacts:"  # optuna.artifacts: an attribute of the trial, frozen once it is told
NOTE_PART = 2045  # characters; the dashboard cuts its notes into attributes of this length
NOTE_KEY = re.compile(r"dashboard:([0-9]+):(note_.*)")
ARTIFACT_ID = re.compile(r"([0-9a-f]{32})-([0-9]+)-([0-9]+)")


class ShownFile(NamedTuple):
    """A file of a trial that the dashboard shows.

    Args:
        study_uid: Under which study it lies.
        name: Its name in the folder of the study's artifacts.
    """

    study_uid: str
    name: str


def artifact_attrs(study_uid: str, number: int, names: Iterable[str] = tuple(SHOWN)) -> dict[str, str]:
    """Return the trial attributes that announce files which lie in a trial's folder.

    The dashboard asks for a file by the id alone, so that the id says where it lies; a trial that is finished twice,
    after a lost lease, announces the same files.
    """
    known = list(SHOWN)
    attrs = {}
    for name in names:
        artifact_id = f"{study_uid}-{number}-{known.index(name)}"
        meta = {"artifact_id": artifact_id, "filename": name, "mimetype": SHOWN[name], "encoding": None}
        attrs[ARTIFACT_KEY + artifact_id] = json.dumps(meta)
    return attrs


def shown_file(artifact_id: str) -> ShownFile | None:
    """Return where a file lies, or nothing if the id is none of ours.

    >>> shown_file("0" * 32 + "-12-1").name
    '12/predictions.png'
    """
    match = ARTIFACT_ID.fullmatch(artifact_id)
    names = list(SHOWN)
    if match is None or int(match[3]) >= len(names):
        return None
    return ShownFile(match[1], f"{match[2]}/{names[int(match[3])]}")


def note_version_key(trial_id: int) -> str:
    """Return the study attribute that says how often a trial's note was written."""
    return f"dashboard:{trial_id}:note_ver"


def note_attrs(trial_id: int, note: str) -> dict[str, Any]:
    """Return a trial's note as attributes of its study, where the dashboard keeps notes."""
    parts = [note[start : start + NOTE_PART] for start in range(0, len(note), NOTE_PART)]
    return {note_version_key(trial_id): 1} | {
        f"dashboard:{trial_id}:note_str:{i}": part for i, part in enumerate(parts)
    }


def moved_notes(attrs: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return the notes among a study's attributes under other keys of the trials.

    >>> moved_notes({"dashboard:7:note_ver": 1, "other": 2}, {7: 3})
    {'dashboard:3:note_ver': 1}
    """
    moved = {}
    for key, value in attrs.items():
        if (match := NOTE_KEY.fullmatch(key)) and int(match[1]) in new_ids:
            moved[f"dashboard:{new_ids[int(match[1])]}:{match[2]}"] = value
    return moved


def trial_note(state: str, attrs: Mapping[str, Any]) -> str:
    """Return what is to be said of a finished trial, in Markdown.

    Args:
        state: How it ended: complete, pruned or fail.
        attrs: Its user attributes: result, reason, attempts, provenance.
    """
    lines = [f"**{_plain(state)}**"]
    if isinstance(result := attrs.get("result"), Mapping):
        lines += _scores(result)
    if reason := attrs.get("reason"):
        # Indented, so that nothing in an error's message is taken for Markdown.
        lines += ["", *(f"    {line}" for line in str(reason).splitlines())]
    if attempts := attrs.get("attempts"):
        lines += ["", "Earlier attempts:", ""]
        lines += [f"- {_plain('{worker}, to epoch {epoch}: {ended}'.format(**each))}" for each in attempts]
    if provenance := attrs.get("provenance"):
        lines += ["", *(f"- {_plain(name)}: {_plain(value)}" for name, value in provenance.items())]
    return "\n".join(lines)


def _scores(result: Mapping[str, Any]) -> list[str]:
    parts = {name: part for name, part in (("validation", result["val"]), ("test", result.get("test"))) if part}
    (score,) = (name for name in result["val"] if name != "per_class")
    lines = [
        "",
        _weights_of(result),
        "",
        f"| {_plain(score)} | {' | '.join(parts)} |",
        "|---|" + "---|" * len(parts),
        f"| all classes | {' | '.join(_number(part[score]) for part in parts.values())} |",
    ]
    for name in result["val"]["per_class"]:
        cells = " | ".join(_number(part["per_class"][name]) for part in parts.values())
        lines.append(f"| {_plain(name)} | {cells} |")
    for name, values in result.get("extra", {}).items():
        lines.append(f"| {_plain(name)} | {' | '.join(_number(values[part]) for part in values)} |")
    return lines


def _weights_of(result: Mapping[str, Any]) -> str:
    """Return with which weights the scores were made."""
    if "folds" not in result:
        return f"With the weights of epoch {result['best_epoch']}, the best:"
    epochs = ", ".join(str(fold["best_epoch"]) for fold in result["folds"])
    return f"Means over {len(result['folds'])} folds, each with the weights of its best epoch ({epochs}):"


def _number(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"


def _plain(value: object) -> str:
    r"""Return a text of which Markdown changes nothing.

    >>> _plain("a|b *c* <d>")
    'a\\|b \\*c\\* &lt;d&gt;'
    """
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
