"""What `fastrl bench` and `bench/` measure with: problems with an fp64 truth, the floor, peers, an interleaved runner.

A result is compared with fp64 before its time is printed, all contenders of a workload are timed in turns in one
process, and every time stands beside the floor of the same run: the bare matrix products of the same shapes.
"""
