"""Where a model's weights may lie to be featurized: whole, on one device of this process."""

from __future__ import annotations

from torch import nn

_GATHER = (
    "Save it whole to a folder (`accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))`"
    " in every process) and featurize that folder in processes of their own, as docs/processes.md tells."
)


def check_whole(model: nn.Module) -> None:
    """Check that a model is in one piece here.

    Raises:
        ValueError: Naming what has spread, wrapped or emptied it, and the way out.
    """
    name = type(model).__name__
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"This {name} is partitioned by DeepSpeed ZeRO-3, whose parameters are empty between two layers. {_GATHER}"
        )
    if "DTensor" in kinds or any("FullyShardedDataParallel" in type(module).__name__ for module in model.modules()):
        raise ValueError(f"The parameters of this {name} are sharded over processes (FSDP or tensor parallelism). {_GATHER}")
    if name == "DistributedDataParallel":
        raise ValueError(
            "This model is wrapped for training; give `accelerator.unwrap_model(model)`, which holds the same weights."
        )
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"This {name} is spread over {', '.join(devices)} by its `device_map`, and features are made where all of it lies on one "
            'device. Load it with `device_map={"": device}` or none; in `dtype=torch.bfloat16` it takes half the memory.'
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"Some weights of this {name} are not loaded (meta tensors). Load it without `device_map` or offloading."
        )
