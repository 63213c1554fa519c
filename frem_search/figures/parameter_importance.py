"""How well each searched parameter foretells a trial's score, and how well it would if scores were noise."""

from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.figures.foretelling import correlations, permuted, ranks_so_far, similarity
from frem_search.figures.labels import impossible, subtitle
from frem_search.figures.seed_spread import SEED
from frem_search.figures.style import BLUE, GREY, GRID, INK, MUTED, dress
from frem_search.study.record import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Bar, Figure

N_PERMUTATIONS = 999
LEVEL = 0.05  # what p, after Holm, must not exceed for a parameter to be told from noise

NOISE = "not distinguishable from noise"
ABOVE_NOISE = "above noise"
ONE_VALUE = "one value in all trials"


class Importance(NamedTuple):
    """One parameter.

    Args:
        name: The parameter.
        value: Correlation of the trials' scores with what it foretells of them, beyond the other parameters.
        noise: The middle 90 % of its values with the scores in random orders; 5 % are above.
        p: The share of permutations, the real order among them, whose value is as high; 1 where nothing varied.
        p_holm: p after Holm's correction for the number of parameters.
        verdict: NOISE, ABOVE_NOISE or ONE_VALUE.
    """

    name: str
    value: float
    noise: tuple[float, float]
    p: float
    p_holm: float
    verdict: str


class ParameterImportanceData(NamedTuple):
    """What the figure shows.

    Args:
        subtitle: Study, dataset and number of trials.
        n_complete: How many complete trials the importances rest on.
        importances: One for each searched parameter, the highest first.
    """

    subtitle: str
    n_complete: int
    importances: tuple[Importance, ...]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per parameter."""
        return [
            {
                "parameter": each.name,
                "importance": each.value,
                "noise, 5 %": each.noise[0],
                "noise, 95 %": each.noise[1],
                "p": each.p,
                "p (Holm)": each.p_holm,
                "verdict": each.verdict,
            }
            for each in self.importances
        ]


def parameter_importance_data(record: StudyRecord) -> ParameterImportanceData:
    """Measure each parameter on the complete trials, and again on their scores in random orders."""
    complete = sorted((trial for trial in record.complete if trial.value is not None), key=lambda trial: trial.number)
    check_possible(record, complete)
    measured = measure(record, complete)
    corrected = holm({name: p for name, (_, _, p) in measured.items()})
    importances = [
        Importance(name, value, noise, p, corrected[name], ABOVE_NOISE if corrected[name] <= LEVEL else NOISE)
        for name, (value, noise, p) in measured.items()
    ]
    importances += [
        Importance(name, 0.0, (0.0, 0.0), 1.0, 1.0, ONE_VALUE) for name in record.searched if name not in measured
    ]
    importances.sort(key=lambda each: -each.value)
    return ParameterImportanceData(subtitle(record), len(complete), tuple(importances))


def check_possible(record: StudyRecord, complete: list[TrialRecord]) -> None:
    """Raise UsageError where there is nothing to tell parameters apart by."""
    more = "Let a worker finish more"
    if not record.searched:
        needs, got = "a searched parameter", "this study searches nothing: every parameter has one value"
        remedy = "Give a parameter a list or a range in the study file"
    elif len(complete) < 2:
        needs, got, remedy = "2 complete trials", f"got {len(complete)}", more
    elif not varied_params(record, complete):
        needs, got, remedy = "a parameter that differs between trials", "all complete trials are equal", more
    elif len({trial.value for trial in complete}) == 1:
        needs, got, remedy = "scores that differ", f"all complete trials score {complete[0].value}", more
    else:
        return
    raise impossible(record, "parameter_importance", needs=needs, got=got, remedy=remedy)


def varied_params(record: StudyRecord, complete: list[TrialRecord]) -> list[str]:
    """Return the searched parameters that had more than one value."""
    return [name for name in record.searched if len({repr(trial.params.get(name)) for trial in complete}) > 1]


def measure(record: StudyRecord, complete: list[TrialRecord]) -> dict[str, tuple[float, tuple[float, float], float]]:
    """Return value, noise and p of each parameter that had more than one value.

    p is for the parameter by itself, and uniform if no score depends on any parameter, whatever the sampler made of the
    scores: `benchmarks/importance_of_noise.py` shows it.
    """
    import numpy as np

    from frem_search.seeds import generator

    space = record.contract["space"] | {SEED: {"choices": []}}  # there is no order in seeds
    alike = {
        name: similarity(space[name], [trial.params.get(name) for trial in complete])
        for name in varied_params(record, complete)
    }
    of_all = sum(alike.values(), np.zeros((len(complete), len(complete))))
    scores = [trial.value for trial in complete if trial.value is not None]
    orders = permuted(scores, generator("parameter_importance", record.name), n=N_PERMUTATIONS)
    ranks = ranks_so_far(orders)
    measured = {}
    for name, own in alike.items():
        value, *of_noise = correlations(ranks, own, of_all - own).tolist()
        # An order that repeats the real one may differ in the last bits.
        n_as_high = sum(each >= value - 1e-9 for each in of_noise)
        low, high = np.quantile(of_noise, [0.05, 0.95]).tolist()
        measured[name] = (value, (low, high), (1 + n_as_high) / (1 + N_PERMUTATIONS))
    return measured


def holm(p: dict[str, float]) -> dict[str, float]:
    """Return p corrected so that the chance of one wrong finding among all parameters is at most the level.

    Source: Holm 1979.

    >>> holm({"B": 0.01, "X": 0.04, "lr": 0.03})
    {'B': 0.03, 'lr': 0.06, 'X': 0.06}
    """
    corrected: dict[str, float] = {}
    highest = 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = highest
    return corrected


def parameter_importance_figure(data: ParameterImportanceData) -> "Figure":
    """Draw one bar per parameter on the range of noise, the most important one on top."""
    import plotly.graph_objects as go

    shown = list(reversed(data.importances))
    figure = go.Figure(noise_bars(shown))
    for name, color, bars in (
        (ABOVE_NOISE, BLUE, [each for each in shown if each.verdict == ABOVE_NOISE]),
        (NOISE, MUTED, [each for each in shown if each.verdict != ABOVE_NOISE]),
    ):
        if bars:
            figure.add_bar(
                x=[each.value for each in bars],
                y=[each.name for each in bars],
                orientation="h",
                width=0.4,
                name=name,
                marker={"color": color},
                customdata=[[each.p, each.p_holm] for each in bars],
                hovertemplate="%{y}: %{x:.4f}<br>p = %{customdata[0]:.3f}, after Holm %{customdata[1]:.3f}"
                f"<extra>{name}</extra>",
            )
    for each in shown:
        at = {"x": end(each), "y": each.name, "xanchor": "left", "xshift": 8}
        figure.add_annotation(**at, text=words(each), align="left", showarrow=False, font={"size": 14, "color": INK})
    reading = "p: of each parameter by itself; words: after Holm's correction for the number of parameters"
    line = f"{data.subtitle}, {data.n_complete} complete<br>{reading}"
    dress(figure, "Which parameter decides the score", subtitle=line, height=310 + 70 * max(len(shown), 2))
    low = 1.1 * min(0.0, *(min(each.value, each.noise[0]) for each in shown))
    # So that the words, three tenths of the width, end within the axes.
    high = max(0.05, *((end(each) - 0.32 * low) / 0.68 for each in shown))
    title = "importance: correlation of scores with what the parameter lets one expect"
    figure.update_xaxes(title_text=title, range=[low, high])
    order = [each.name for each in shown]
    figure.update_yaxes(showgrid=False, ticks="", type="category", categoryorder="array", categoryarray=order)
    figure.update_layout(barmode="overlay", margin_t=108)
    return figure


def noise_bars(shown: list[Importance]) -> "Bar":
    """Return a wide bar per parameter from the lower to the upper end of what noise gives."""
    import plotly.graph_objects as go

    return go.Bar(
        x=[high - low for _, _, (low, high), *_ in shown],
        base=[each.noise[0] for each in shown],
        y=[each.name for each in shown],
        orientation="h",
        width=0.8,
        name=f"noise: of {N_PERMUTATIONS} random orders of the scores, 5 % lie above, 5 % below",
        marker={"color": GRID, "line": {"color": GREY, "width": 1}},
        customdata=[each.noise for each in shown],
        hovertemplate="%{y}: %{customdata[0]:.4f} to %{customdata[1]:.4f}<extra>noise</extra>",
    )


def end(each: Importance) -> float:
    """Return where the longer one of a parameter's bars ends, and its words begin."""
    return max(each.value, each.noise[1], 0.0)


def words(each: Importance) -> str:
    """Return what stands beside a parameter's bars."""
    if each.verdict == ONE_VALUE:
        return ONE_VALUE
    line = f"{each.value:.2f}, p = {each.p:.3f}"
    return line if each.verdict == ABOVE_NOISE else f"{line}<br><span style='color: {MUTED}'>{NOISE}</span>"
