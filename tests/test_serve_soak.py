"""A server under mixed load with faults: right statuses, a quiet server's answers, and nothing that grows."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import pytest

from soak import SECRET, Clients, started

OPTIONS = ("--max-requests", "3", "--queue", "3", "--context", "512", "--prefix-memory", "8MiB")


def _soak(folder: Path, seed: int, seconds: float, rounds: int) -> None:
    """Rounds of load; after each the server is idle and weighed. A third of them is to warm up."""
    log = folder / "log"
    with started(log, *OPTIONS) as server:
        clients = Clients(server, seed)
        clients.learn()
        sizes = []
        for at in range(rounds):
            clients.run(seconds / rounds, at)
            assert not clients.wrong, "\n".join(clients.wrong[:20])
            server.wait_idle()
            time.sleep(0.5)
            sizes.append(server.size())
            print(
                f"round {at}: {sizes[-1][0] / 2**20:.1f} MiB, {sizes[-1][1]} threads, {sizes[-1][2]} files", flush=True
            )
        assert clients.learn() == clients.answers
        waits_for = sum(count for (_, status), count in clients.counts.items() if status == 429)
        print(f"{clients.counts.total()} requests, {waits_for} of them 429", flush=True)
    said = log.read_text()
    assert SECRET not in said
    assert "Traceback" not in said
    assert waits_for
    assert {0, 200, 400} <= {status for _, status in clients.counts}
    memory, threads, files = zip(*sizes[math.ceil(rounds / 3) :], strict=True)
    half = len(memory) // 2
    assert statistics.median(memory[-half:]) <= 1.02 * statistics.median(memory[:half])
    assert max(threads) == min(threads)
    assert max(files) == min(files)


@pytest.mark.timeout(300)
def test_a_minute(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _soak(tmp_path, request.config.getoption("--seed"), 60, 12)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_half_an_hour(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    _soak(tmp_path, request.config.getoption("--seed"), 1800, 60)
