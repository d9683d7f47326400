"""Speed of the data path on the embedded corpus: `python -m benchmarks.data`.

Prints a table, and as its last line one JSON object.
"""

import json
import tempfile
import time
from collections.abc import Callable

from lmlab.data.config import Bytes, DataConfig, TrainedBPE
from lmlab.data.open import Data, open_data

BATCHES = 400


def main() -> None:
    """Measure building and opening the caches, batches in order, and seeks."""
    with tempfile.TemporaryDirectory() as folder:
        byte_config = DataConfig(tokenizer=Bytes(), length=256, batch_size=16, cache_dir=folder)
        bpe_config = DataConfig(tokenizer=TrainedBPE(4096), length=256, batch_size=16, cache_dir=folder)
        _, cold_bytes = timed(lambda: open_data(byte_config))
        _, cold_bpe = timed(lambda: open_data(bpe_config))
        data, warm = timed(lambda: open_data(bpe_config))
        speed, seek = tokens_per_second(data, bpe_config), seek_milliseconds(data, 10**9)
    for label, value in (
        ("prepare corpus and cache bytes, s", cold_bytes),
        ("train BPE 4096 and cache, s", cold_bpe),
        ("open what is cached, s", warm),
        (f"batches in order, tok/s ({BATCHES} of 16 x 256)", speed),
        ("seek to step 10**9, ms", seek),
    ):
        print(f"{label:48} {value:>14,.3f}")
    print(json.dumps({"tokens_per_second": round(speed), "seek_ms_1e9": round(seek, 3)}))


def timed(run: Callable[[], Data]) -> tuple[Data, float]:
    """What `run` returns, and the seconds that it took."""
    begin = time.perf_counter()
    return run(), time.perf_counter() - begin


def tokens_per_second(data: Data, config: DataConfig) -> float:
    """Tokens read from prefetched batches in a second, all threads together."""
    begin = time.perf_counter()
    for _ in data.train.batches(0, BATCHES):
        pass
    return BATCHES * config.batch_size * config.length / (time.perf_counter() - begin)


def seek_milliseconds(data: Data, step: int) -> float:
    """Time of the first batch at a step that was never near."""
    begin = time.perf_counter()
    data.train.batch_at(step)
    return 1e3 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
