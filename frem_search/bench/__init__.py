"""How fast this machine trains a study: a plain loop and every arrangement of trials, measured in one run.

`arrangement.py` finds the fastest arrangement for a study and remembers it; `speed.py` measures one. The command
`bench` compares them with `plain_loop.py`: `choice.py` says what enters, `result.py` what follows from the numbers;
`report.py` and `figure.py` show them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from frem_search.bench.choice import Choice, entrants
from frem_search.bench.flops import image_flops, matmul_rate
from frem_search.bench.plain_speed import measure_plain
from frem_search.bench.report import bench_json, bench_lines
from frem_search.bench.result import Bench, Entrant, Row
from frem_search.bench.speed import Speed, Trainee, measure
from frem_search.study.file import StudyFile
from frem_search.system.cores import n_cores
from frem_search.system.device import describe_device, make_repeatable
from frem_search.training.recipe import check_dataset, split_params

__all__ = ["Bench", "Choice", "Entrant", "Row", "bench_json", "bench_lines", "entrants", "run_bench"]


def measure_entrant(trainee: Trainee, entrant: Entrant, *, seconds: float) -> Speed:
    """Measure a row once.

    Args:
        trainee: What is trained.
        entrant: By whom, and in which precision.
        seconds: For how long at least.
    """
    if entrant.is_plain:
        return measure_plain(trainee, entrant.arrangement, seconds=seconds)
    return measure(replace(trainee, precision=entrant.precision), entrant.arrangement, seconds=seconds)


def run_bench(
    trainee: Trainee,
    contestants: Sequence[Entrant],
    *,
    n_rounds: int = 3,
    seconds: float = 3.0,
    measure_one: Callable[..., Speed] = measure_entrant,
    tell: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Measure all rows in turn, round after round, so that a change of the machine's speed meets all of them.

    A row that could not be run is not tried again.

    Args:
        trainee: What is trained.
        contestants: The rows; the first is what the others are compared with.
        n_rounds: How often each row is measured.
        seconds: For how long at least in each round.
        measure_one: Called as `measure_entrant`.
        tell: Told in a line what was measured.

    Raises:
        UsageError: Loss or score do not take the dataset's classes.
        StudyFileError: Images cannot be cut or turned as the study says.
    """
    check_dataset(trainee.study_file, trainee.dataset)
    make_repeatable(trainee.device)  # fp32 is fp32, also in what is measured of the device
    tell(f"counting operations, measuring matrix products on {describe_device(trainee.device)}")
    flops = image_flops(trainee)
    rates = {name: matmul_rate(trainee.device, name) for name in dict.fromkeys(e.precision for e in contestants)}
    measured: dict[Entrant, list[Speed]] = {entrant: [] for entrant in contestants}
    for n in range(1, n_rounds + 1):
        for entrant, speeds in measured.items():
            if speeds and speeds[-1].error:
                continue
            speeds.append(measure_one(trainee, entrant, seconds=seconds))
            came_to = f"failed: {_first_line(speeds[-1].error)}" if speeds[-1].error else _rate(speeds[-1])
            tell(f"round {n} of {n_rounds}: {entrant}, {entrant.precision}: {came_to}")
    file, dataset = trainee.study_file, trainee.dataset
    split = dataset.splits[file.folds[0]]
    training = split_params(file, trainee.params).training
    size = training.image_size or dataset.images.shape[2:]
    return Bench(
        study=file.name,
        dataset=dataset.name,
        device=describe_device(trainee.device),
        cores=n_cores(),
        n_train=len(split.train),
        n_val=len(split.val),
        image_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        batch_size=training.batch_size,
        n_epochs=file.n_epochs,
        images_per_trial=trainee.images_per_trial,
        n_rounds=n_rounds,
        seconds=seconds,
        image_flops=flops,
        matmul_rates=rates,
        rows=tuple(_row(file, entrant, speeds) for entrant, speeds in measured.items()),
    )


def _row(file: StudyFile, entrant: Entrant, speeds: Sequence[Speed]) -> Row:
    if speeds[-1].error:  # rounds before it would be compared with rounds that it has not
        return Row(entrant, (), error=_first_line(speeds[-1].error))
    # Folds side by side are members too; the plain loop trains one, and those in sequence follow one another.
    n_folds = 1 if entrant.is_plain or file.is_pruned_by_fold else len(file.folds)
    peak = max(speed.peak_memory for speed in speeds) // (entrant.arrangement.cohort * n_folds)
    return Row(entrant, tuple(speed.images_per_s for speed in speeds), peak)


def _rate(speed: Speed) -> str:
    return f"{speed.images_per_s:.0f} images/s"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
