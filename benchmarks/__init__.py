"""Speed and memory of DropConnect by surgery, measured beside plain layers and beside peers.

    make bench          # everything, into out/bench/
    make bench-quick    # under two minutes: without what compiles whole models or starts processes

Every ratio is one of medians of one run, in which the contenders take turns.
"""
