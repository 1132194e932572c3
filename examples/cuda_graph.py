"""A training step in a CUDA graph: each replay adds its rows to the running sums."""

from __future__ import annotations

import torch

from twloss import MultiTaskLoss


def main() -> None:
    """Capture one step and replay it over ten batches."""
    loss = MultiTaskLoss("bce_with_logits", ["like", "reply"], fused=True).to("cuda")
    logits = torch.zeros(4096, 2, device="cuda", requires_grad=True)
    labels = torch.zeros(4096, 2, device="cuda")

    # A few steps first, on another stream: they create constants, and compile.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss(logits, labels)["loss"].backward()
            logits.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    loss.reset()  # the steps so far are not to count

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = loss(logits, labels)
        losses["loss"].backward()

    for _ in range(10):
        with torch.no_grad():
            logits.normal_()
            labels.bernoulli_(0.3)
        graph.replay()
    print("the last batch:", losses["loss"].item())
    print("all ten:", loss.compute()["loss"].item())


if __name__ == "__main__":
    main()
