"""How much memory there is."""

import torch


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None on a system that does not say."""
    if device.type == "cuda":
        # PyTorch keeps what was given back to it, and gives it out again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left for what was tried."""
    return isinstance(error, torch.OutOfMemoryError)
