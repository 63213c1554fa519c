"""How much each searched parameter decides whether a trial is among the best.

Source: Watanabe, Bansal, Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces",
arXiv:2304.10255, in Optuna's implementation with Optuna's defaults: the best tenth of the trials against all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from frem_search.figures.labels import impossible, subtitle
from frem_search.figures.style import BLUE, dress
from frem_search.study.record import StudyRecord, TrialRecord

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from plotly.graph_objects import Figure


class ParameterImportanceData(NamedTuple):
    """What the figure shows.

    Args:
        subtitle: Study, dataset and number of trials.
        n_complete: How many complete trials the importances rest on.
        importances: Parameter and share, the highest first; the shares sum to 1.
    """

    subtitle: str
    n_complete: int
    importances: tuple[tuple[str, float], ...]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per parameter."""
        return [{"parameter": name, "importance": share} for name, share in self.importances]


def parameter_importance_data(record: StudyRecord) -> ParameterImportanceData:
    """Ask Optuna's evaluator, on a study in memory that holds the complete trials."""
    complete = [trial for trial in record.complete if trial.value is not None]
    check_possible(record, complete)
    varied = varied_params(record, complete)
    shares = evaluate(complete, {name: record.contract["space"][name] for name in varied})
    shares |= {name: 0.0 for name in record.searched if name not in shares}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ParameterImportanceData(subtitle(record), len(complete), tuple(ordered))


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


def evaluate(trials: list[TrialRecord], space: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return each parameter's share as Optuna computes it."""
    import optuna

    with quiet_optuna():
        study = optuna.create_study(direction="maximize", storage=optuna.storages.InMemoryStorage())
    tried = [{name: trial.params[name] for name in space if name in trial.params} for trial in trials]
    # One distribution for all trials: the evaluator treats trials of another distribution as another search.
    distributions = {
        name: distribution(entry, [params[name] for params in tried if name in params]) for name, entry in space.items()
    }
    for trial, params in zip(trials, tried, strict=True):
        frozen = optuna.trial.create_trial(
            params={name: primitive(value) for name, value in params.items()},
            distributions={name: distributions[name] for name in params},
            value=trial.value,
        )
        study.add_trial(frozen)
    return optuna.importance.get_param_importances(study)


def distribution(entry: dict[str, Any], tried: list[Any]) -> "BaseDistribution":
    """Return an entry of the search space as Optuna's distribution, widened to values enqueued outside of it.

    The step is left out: the evaluator sorts values into 50 bins, and an enqueued value need not lie on the step.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "choices" in entry:
        choices = [primitive(choice) for choice in [*entry["choices"], *tried]]
        return CategoricalDistribution(list(dict.fromkeys(choices)))
    low, high = min([entry["low"], *tried]), max([entry["high"], *tried])
    is_log = bool(entry.get("log", False)) and low > 0
    if all(isinstance(value, int) for value in [low, high, *tried]):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(low, high, log=is_log)


def primitive(choice: Any) -> Any:
    """Return a choice as Optuna can keep it: a list is kept as its text."""
    return choice if choice is None or isinstance(choice, bool | int | float | str) else repr(choice)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna from reporting the study in memory as if it were a user's."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def parameter_importance_figure(data: ParameterImportanceData) -> "Figure":
    """Draw one bar per parameter, the most important one on top."""
    import plotly.graph_objects as go

    names = [name for name, _ in reversed(data.importances)]
    shares = [share for _, share in reversed(data.importances)]
    bars = go.Bar(
        x=shares,
        y=names,
        orientation="h",
        marker={"color": BLUE},
        text=[f"{share:.2f}" for share in shares],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.4f}<extra></extra>",
    )
    figure = go.Figure(bars)
    line = f"{data.subtitle} · PED-ANOVA on {data.n_complete} complete trials"
    dress(figure, "Which parameter decides the score", subtitle=line, height=240 + 60 * max(len(names), 2))
    figure.update_xaxes(title_text="importance (all sum to 1)", range=[0, 1.1 * max(shares)])
    figure.update_yaxes(showgrid=False, ticks="", type="category")
    figure.update_layout(bargap=0.45)
    return figure
