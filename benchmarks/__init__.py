"""twloss beside what people use today, on the same work in one run, with the claims asserted.

``python -m benchmarks`` takes this way, a file a stage::

    workload.py     the tensors of a size, and twloss's own step on them
    rivals.py       what people use today, on the same tensors
    paired.py       timing: A B C … A B C …, and the median of the paired ratios
    counts.py       counting: kernels, collectives, peak memory
    ranks.py        real gloo ranks on the loopback interface
    <benchmark>.py  one file a benchmark: yields rows
    row.py          Row: one comparison, with its goal
    report.py       rows -> tables, JSON, markdown
    chart.py        rows -> a PNG bar chart
    machine.py      what the figures were measured on
"""
