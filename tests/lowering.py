"""A backend of torch.compile that lowers every graph by Inductor to Triton for sm_90 and compiles
the kernels to machine code, without a GPU; the graphs themselves run on fake tensors."""

import re
from collections import Counter

import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import unset_fake_temporarily
from triton.backends.compiler import GPUTarget


class NoDriver:
    """What Inductor asks of the driver of a card."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))


triton.runtime.driver.set_active(NoDriver())
triton_helpers.set_driver_to_gpu = lambda: None
made = Counter()
TRITON = re.compile(r"async_compile\.triton\('\w+', '''(.*?)'''", re.DOTALL)


def lower(graph_module, inputs):
    """Counts graphs and kernels in `made`."""
    fake = torch._guards.detect_fake_mode(inputs)
    graph = GraphLowering(graph_module, inputs, shape_env=fake.shape_env)
    with V.set_fake_mode(fake), V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
        graph.run(*inputs)
        code = graph.codegen()[0]
    code = code if isinstance(code, str) else code.value
    made["graphs"] += 1
    made["calls of motus"] += len(re.findall(r"torch\.ops\.motus\.\w+\.default\(", code))
    for source in TRITON.findall(code):
        with unset_fake_temporarily():
            module = PyCodeCache.load(source.replace("\\\\", "\\"))
            kernels = [v for k, v in vars(module).items() if k.startswith("triton_")]
            (kernel,) = [kernel for kernel in kernels if hasattr(kernel, "precompile")]
            kernel.precompile(warm_cache_only=True)
        made["kernels"] += 1
    return make_boxed_func(graph_module.forward)


decompositions = select_decomp_table()
backend = aot_autograd(
    fw_compiler=lower, bw_compiler=lower, inference_compiler=lower, decompositions=decompositions
)
