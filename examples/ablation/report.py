"""Writes tables and plots of the rows of `ablation.run` into the folder of the rows.

    PYTHONPATH=examples python -m ablation.report examples/results/ablation.jsonl

`ablation.md` has accuracies by compressor and by selection, `ablation.png` those by compressor, `budget.png` those by
share of frames kept. Means and standard deviations are over seeds.
"""

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from mambamia_hf.files import atomic_write

from .run import TASKS


MAMBAMIA = "MambaMia"
COLUMNS = [*TASKS, "all"]
CHANCE = 25  # percent
# Of the table of selections: name and share of frames as in the rows, and what to call them.
SELECTIONS = {
    ("all", 1.0): "no selection",
    ("uniform", 0.5): "uniform 50 %",
    ("delta_threshold", 0.5): "Δ threshold, about 50 %",
    ("delta_budget", 0.5): "exact budget, 50 %",
}


def scores_by_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracies in percent by variant, test, selection and seed; a column per task, and "all" for their mean."""
    keys = ["variant", "num_frames", "selection", "keep_ratio", "seed"]
    scores = 100 * rows.pivot(index=keys, columns="task", values="accuracy")
    scores["all"] = scores[list(TASKS)].mean(axis=1)
    return scores[COLUMNS]


def over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of the scores by variant, test and selection."""
    return scores.groupby(["variant", "num_frames", "selection", "keep_ratio"]).agg(["mean", "std"])


def markdown(rows: pd.DataFrame) -> str:
    first, variants = rows.iloc[0], rows["variant"].unique()
    summary = over_seeds(scores_by_run(rows))
    about = rows.drop_duplicates(["variant", "seed"]).groupby("variant")
    about = about[["parameters", "tokens_per_frame", "training_seconds"]].mean()
    kept = rows[rows["variant"] == MAMBAMIA].groupby(["num_frames", "selection", "keep_ratio"])["frames_kept"].mean()
    lines = [
        f"Accuracy in percent, mean and standard deviation over {rows['seed'].nunique()} seeds; chance is {CHANCE}. "
        f"All were trained for {first['image_steps']} steps on stills and {first['video_steps']} on videos of up to "
        f"{first['train_frames']} frames.",
    ]
    for num_frames in rows["num_frames"].unique():
        lines += [
            "",
            f"{first['num_videos']} test videos of {num_frames} frames:",
            "",
            f"| compressor | parameters | tokens per frame | {' | '.join(COLUMNS)} | CPU minutes of training |",
            f"| --- | ---: | ---: |{' ---: |' * len(COLUMNS)} ---: |",
        ]
        for name in variants:
            parameters, tokens, seconds = about.loc[name]
            cells = _cells(summary.loc[name, num_frames, "all", 1.0])
            lines.append(f"| {name} | {parameters:,.0f} | {tokens:.0f} | {cells} | {seconds / 60:.1f} |")
        lines += [
            "",
            f"The same {num_frames} frames, selected at inference, on the MambaMia models above:",
            "",
            f"| selection | frames kept | {' | '.join(COLUMNS)} |",
            f"| --- | ---: |{' ---: |' * len(COLUMNS)}",
        ]
        for selection, name in SELECTIONS.items():
            cells = _cells(summary.loc[(MAMBAMIA, num_frames, *selection)])
            lines.append(f"| {name} | {kept[(num_frames, *selection)]:.0%} | {cells} |")
    return "\n".join(lines) + "\n"


def _cells(scores: pd.Series) -> str:
    return " | ".join(f"{scores[column, 'mean']:.1f} ± {scores[column, 'std']:.1f}" for column in COLUMNS)


def plot_variants(rows: pd.DataFrame) -> Figure:
    variants, tests = list(rows["variant"].unique()), rows["num_frames"].unique()
    summary = over_seeds(scores_by_run(rows)).xs(("all", 1.0), level=("selection", "keep_ratio"))
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.subplots(len(tests), len(COLUMNS), sharex=True, sharey=True, squeeze=False)
    for axes, num_frames in zip(grid, tests, strict=True):
        of_test = summary.xs(num_frames, level="num_frames").loc[variants]
        for axis, column in zip(axes, COLUMNS, strict=True):
            colours = ["tab:blue" if name == MAMBAMIA else "tab:gray" for name in variants]
            axis.barh(variants, of_test[column, "mean"], xerr=of_test[column, "std"], color=colours)
            axis.axvline(CHANCE, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=f"{column}\n{num_frames} frames", xlim=(0, 100))
    for axis in grid[-1]:
        axis.set_xlabel("accuracy, %")
    grid[0, 0].invert_yaxis()
    return figure


def plot_budgets(rows: pd.DataFrame) -> Figure:
    """The runs of MambaMia as thin lines and their mean as a thick one."""
    tests = rows["num_frames"].unique()
    scores = scores_by_run(rows[rows["variant"] == MAMBAMIA])
    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.subplots(len(tests), len(TASKS), sharex=True, sharey=True, squeeze=False)
    for axes, num_frames in zip(grid, tests, strict=True):
        of_test = scores.loc[MAMBAMIA, num_frames]
        for selection, label, colour in (("delta_budget", "by Δ", "tab:blue"), ("uniform", "uniform", "tab:orange")):
            by_share = pd.concat([of_test.loc[selection], of_test.loc["all"]]).sort_index()
            for axis, task in zip(axes, TASKS, strict=True):
                runs = by_share[task].unstack("seed")
                shares = 100 * runs.index
                axis.plot(shares, runs, color=colour, linewidth=0.8, alpha=0.5)
                axis.plot(shares, runs.mean(axis=1), color=colour, linewidth=2, marker="o", markersize=3, label=label)
        for axis, task in zip(axes, TASKS, strict=True):
            axis.axhline(CHANCE, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=f"{task}, {num_frames} frames", ylim=(0, 105))
        axes[0].set_ylabel("accuracy, %")
    for axis in grid[-1]:
        axis.set_xlabel("frames kept, %")
    grid[-1, -1].legend(loc="upper right")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSONL file of ablation.run")
    file = parser.parse_args(arguments).rows
    rows = pd.read_json(file, lines=True)
    with atomic_write(file.with_name("ablation.md")) as unfinished:
        unfinished.write_text(markdown(rows), encoding="utf-8")
    for name, figure in (("ablation.png", plot_variants(rows)), ("budget.png", plot_budgets(rows))):
        with atomic_write(file.with_name(name)) as unfinished:
            figure.savefig(unfinished, dpi=120)
    print(markdown(rows))


if __name__ == "__main__":
    main()
