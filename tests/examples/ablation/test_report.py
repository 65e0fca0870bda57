"""`examples/ablation/report.py`: the committed tables are those of the committed rows."""

import shutil
from pathlib import Path

import ablation
import pandas as pd
import pytest
from ablation.report import main, markdown, scores_by_run


RESULTS = Path(ablation.__file__).parents[1] / "results"


def test_the_committed_table_is_that_of_the_committed_rows(tmp_path):
    file = tmp_path / "my results" / "ablation.jsonl"
    file.parent.mkdir()
    shutil.copy(RESULTS / "ablation.jsonl", file)
    main([str(file)])
    assert file.with_name("ablation.md").read_text() == (RESULTS / "ablation.md").read_text()
    for name in ("ablation.png", "budget.png"):
        assert file.with_name(name).stat().st_size > 20_000


def test_means_and_deviations():
    rows = pd.DataFrame(
        {
            "variant": "MambaMia",
            "num_frames": 32,
            "num_videos": 300,
            "train_frames": 32,
            "image_steps": 100,
            "video_steps": 1200,
            "parameters": 1000,
            "tokens_per_frame": 1,
            "training_seconds": 90.0,
            "selection": selection,
            "keep_ratio": keep_ratio,
            "frames_kept": keep_ratio,
            "seed": seed,
            "task": task,
            "accuracy": accuracy + 0.1 * seed,
        }
        for seed in (0, 1)
        for selection, keep_ratio in (("all", 1.0), ("uniform", 0.5), ("delta_threshold", 0.5), ("delta_budget", 0.5))
        for task, accuracy in (("retrieval", 0.8), ("ordering", 0.2), ("counting", 0.5))
    )
    assert scores_by_run(rows).loc["MambaMia", 32, "uniform", 0.5, 1]["all"] == pytest.approx(60)
    table = markdown(rows)
    assert "| MambaMia | 1,000 | 1 | 85.0 ± 7.1 | 25.0 ± 7.1 | 55.0 ± 7.1 | 55.0 ± 7.1 | 1.5 |" in table
    assert "| uniform 50 % | 50% | 85.0 ± 7.1 |" in table
