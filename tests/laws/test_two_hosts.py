"""Two hosts, started by the commands of docs/guides/several-hosts.md: one process's numbers, a dead host, a cut cable.

The hosts are network namespaces, which take Debian's package iproute2 and root; see tests/support/two_hosts.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples import several_hosts as example
from tests.support import reference
from tests.support.by_hand import Columns, HandRanker, Rows, together
from tests.support.launch import numbers_in
from tests.support.patience import SECONDS
from tests.support.rank_pool import RankPool
from tests.support.results import assert_close, numbers
from tests.support.two_hosts import ROOT, Host, NoNamespacesError, two_hosts, wait_for

GUIDE = ROOT / "docs" / "guides" / "several-hosts.md"
RULE = reference.Rule()
INTERFACE = "export GLOO_SOCKET_IFNAME=eth0\n"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, where this machine allows such."""
    try:
        with two_hosts(tmp_path) as pair:
            yield pair
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces on this machine: {error}")


def commands(arguments: str) -> list[str]:
    """What the guide says to run on the first host and on the second, and further arguments."""
    blocks = re.findall(r"^```sh\n(.*?)\n```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert all(block.startswith(INTERFACE) and "--nproc-per-node=2 " in block for block in blocks)
    return [f"{block} {arguments}" for block in blocks]


def start(hosts: tuple[Host, Host], arguments: str) -> None:
    """Start one process on each host, to train until it is stopped."""
    for host, command in zip(hosts, commands(f"--steps 1000000 {arguments}")):
        host.start(command.replace("--nproc-per-node=2 ", "--nproc-per-node=1 "))


def steps_of(ranker: HandRanker, count: int) -> list[tuple[Columns, list[int]]]:
    """The rows of each step, trained on by hand in one process, and their numbers in the data."""
    data = Rows.of(*example.rows())
    places = [list(range(start, min(start + 15, 91))) for start in range(0, 91, 15)]
    taken = [places[step % len(places)] for step in range(count)]
    return [(ranker.step(data.take(rows)), rows) for rows in taken]


def by_hand() -> HandRanker:
    """The example's ranker before it is trained."""
    torch.manual_seed(0)
    return HandRanker(example.Ranker().heads, example.TASKS, learning_rate=0.1)


def train_on(rank: int) -> dict[str, float]:
    return example.main()


@pytest.fixture(scope="module")
def trained() -> tuple[HandRanker, list[Columns]]:
    """The example, trained by hand in one process, and the rows of each step."""
    ranker = by_hand()
    return ranker, [columns for columns, _ in steps_of(ranker, example.STEPS)]


def test_the_example_gives_the_losses_of_one_process(
    ranks: RankPool, trained: tuple[HandRanker, list[Columns]]
) -> None:
    expected = reference.losses(together(trained[1]), RULE)
    for results in [example.main(), *ranks.run(train_on)]:
        assert results == pytest.approx(expected, rel=1e-12)


@pytest.mark.exhaustive
def test_two_hosts_give_the_numbers_of_one_process(
    hosts: tuple[Host, Host], trained: tuple[HandRanker, list[Columns]], tmp_path: Path
) -> None:
    """Four ranks, of which three have no row in the last step of an epoch: each step, the sums and the weights."""
    saved = tmp_path / "saved.pt"
    for host, command in zip(hosts, commands(f"--save {saved} --timeout {SECONDS}")):
        host.start(command)
    assert [host.wait() for host in hosts] == [0, 0], [host.output() for host in hosts]
    ranker, steps = trained
    expected = {f"step {step} loss": reference.losses(rows, RULE)["loss"] for step, rows in enumerate(steps, 1)}
    results = reference.losses(together(steps), RULE)
    expected.update({f"all {key}": value for key, value in results.items()})
    assert numbers_in(hosts[0].output()) == pytest.approx(expected, rel=1e-12)
    assert numbers_in(hosts[1].output()) == {}

    restored = example.Ranker()
    restored.load_state_dict(torch.load(saved, weights_only=True))
    heads = [*restored.heads.weight.flatten().tolist(), *restored.heads.bias.tolist()]
    assert heads == pytest.approx(ranker.parameters(), rel=1e-12)
    assert_close(numbers(restored.loss.train_metric.compute()), results)


def expect_own_sums(host: Host, rank: int) -> None:
    """What a rank printed after the error is what its own rows of all its steps give, by hand."""
    printed = {
        key.removeprefix(f"rank {rank} "): value
        for key, value in numbers_in(host.output()).items()
        if key.startswith("rank")
    }
    updates = int(printed.pop("updates"))
    assert updates > 20
    own = []
    for columns, places in steps_of(by_hand(), updates):
        # Of three rows in turn, the first rank has the first and the last.
        mine = [place for place, row in enumerate(places) if (row % 3 == 1) == (rank == 1)]
        own.append({task: [rows[place] for place in mine] for task, rows in columns.items()})
    assert printed == pytest.approx(reference.losses(together(own), RULE), rel=1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("killed", [0, 1], ids=["the first, with the rendezvous", "the second"])
def test_a_killed_host_is_an_error_before_the_time_out_and_costs_no_sums(hosts: tuple[Host, Host], killed: int) -> None:
    start(hosts, f"--timeout {SECONDS}")
    wait_for("step 30 ", hosts[0])
    hosts[killed].kill()
    rank = 1 - killed
    wait_for(f"rank {rank} is alone: ", hosts[rank])
    assert hosts[rank].wait() != 0
    assert "imed out" not in hosts[rank].output()
    expect_own_sums(hosts[rank], rank)


@pytest.mark.exhaustive
def test_a_cut_cable_is_an_error_at_the_time_out_and_costs_no_sums(hosts: tuple[Host, Host]) -> None:
    # In which they have to find each other, too.
    start(hosts, "--timeout 60")
    wait_for("step 30 ", hosts[0])
    hosts[1].cut()
    for rank, host in enumerate(hosts):
        wait_for(f"rank {rank} is alone: ", host)
        (error,) = re.findall(rf"^rank {rank} is alone: (.*)$", host.output(), re.MULTILINE)
        assert re.search(r"[Tt]imed out .*60000 ?ms", error), error
        expect_own_sums(host, rank)


@pytest.mark.exhaustive
def test_without_the_interface_a_host_looks_for_the_other_at_home(hosts: tuple[Host, Host]) -> None:
    for host, command in zip(hosts, commands("")):
        host.start(command.removeprefix(INTERFACE))
    wait_for("Connection refused, remote=[127.0.1.1]", *hosts)
