"""``gradckpt bench frontier``: step time against peak bytes, of this package and of its peers."""

from gradckpt_dist.bench.frontier.bench import bench_frontier, bench_frontier_coarse, bench_frontier_wide
from gradckpt_dist.bench.frontier.figure import draw_frontier

__all__ = ["bench_frontier", "bench_frontier_coarse", "bench_frontier_wide", "draw_frontier"]
