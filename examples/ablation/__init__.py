"""MambaMia, MambaMia without one of its parts, and other compressors in its place, compared on the needle benchmark.

    baselines   the other compressors
    run         trains and scores all of them; one JSON row per score
    report      tables and plots of these rows

`run.sh` does all of it.
"""
