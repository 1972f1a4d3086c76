"""What PyTorch has captured and recorded on a CUDA device so far."""

import torch


def cudagraph_counts() -> dict[str, int]:
    counters = torch._dynamo.utils.counters
    return {
        "skips": counters["inductor"]["cudagraph_skips"],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def recordings() -> int:
    """CUDA graphs recorded so far on this device; asking takes a number too."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else int(manager.new_graph_id().id)
