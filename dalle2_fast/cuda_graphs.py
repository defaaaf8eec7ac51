"""Functions as CUDA graphs: captured once and then replayed, without the cost of launching each kernel.

A function that is captured reads and writes tensors that exist before and after it. What it allocates is free
when it returns; therefore all graphs may share one memory pool, in whatever order they are replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM_UPS = 2  # libraries choose their kernels and allocate workspaces when they are first called


class CudaGraphs:
    """Captures functions of one device, in one memory pool.

    Args:
        device: a CUDA device.

    Raises:
        ValueError: the device has no CUDA graphs.
    """

    def __init__(self, device: torch.device) -> None:
        if reason := self.why_unavailable(device):
            raise ValueError(f"device: {reason}")
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool = None

    @staticmethod
    def why_unavailable(device: torch.device) -> str | None:
        """Why there are no CUDA graphs on a device; None if there are."""
        if device.type != "cuda":
            return f"CUDA graphs need a CUDA device, got {device}"
        if torch.version.cuda is None:
            return "CUDA graphs need an NVIDIA GPU and a torch built with CUDA"
        return None

    def warm_up(self, function: Callable[[], None], times: int = WARM_UPS) -> None:
        """Call a function on the stream on which it will be captured."""
        with torch.cuda.device(self.device):
            stream = self._side_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(times):
                    function()
            torch.cuda.current_stream().wait_stream(stream)

    def capture(
        self, function: Callable[[], None], generators: Sequence[torch.Generator] = ()
    ) -> Callable[[], None]:
        """Capture a function, which is not run, and return what replays it.

        Args:
            function: see the head of this file; it was warmed up.
            generators: of random numbers that it draws from, except torch's default one. A replay draws from
                where they then are.

        Raises:
            RuntimeError: the function cannot be captured; an OutOfMemoryError (also in the context of another
                error) for want of memory.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Other threads, such as those that load data, may allocate memory in the meantime.
            options = dict(pool=self._pool, stream=self._side_stream(), capture_error_mode="thread_local")
            with torch.cuda.graph(graph, **options):
                function()
        return graph.replay

    def marker(self) -> Callable[[], bool]:
        """Mark the end of the work so far; the result says, without waiting, whether it was reached."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event.query

    def release(self) -> None:
        """Return the memory of graphs that no longer exist to the device."""
        self._pool = None
        torch.cuda.empty_cache()

    def _side_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream
