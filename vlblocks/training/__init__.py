"""The pieces of a training loop: optimiser and schedule, checkpoints, logging, guard, precision, command line."""

from vlblocks.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
)
from vlblocks.training.cli import flag_value, parse, parse_config, run_main
from vlblocks.training.config import compare_configs, config_from_dict, config_to_dict, require_same_config
from vlblocks.training.distributed import (
    barrier,
    broadcast_object,
    gather_objects,
    is_distributed,
    is_main,
)
from vlblocks.training.files import (
    json_text,
    read_json,
    read_tensors,
    write_atomic,
    write_json_atomic,
    write_tensors_atomic,
)
from vlblocks.training.finetuning import Finetuned, Plan, finetune, freeze, layer_scales
from vlblocks.training.gradients import average_gradients
from vlblocks.training.guard import NonFiniteError, NonFiniteGuard
from vlblocks.training.logging import RunLog, read_history
from vlblocks.training.loop import Stateful, Steps, make_accelerator, prepare_folder, step_generator
from vlblocks.training.optim import adamw, parameter_groups, scale_rates
from vlblocks.training.precision import cpu_has_fast_bf16, default_mixed_precision
from vlblocks.training.random_state import get_rng_state, seed_everything, set_rng_state
from vlblocks.training.schedule import Schedule, set_lr

__all__ = [
    "Checkpoint",
    "Finetuned",
    "NonFiniteError",
    "NonFiniteGuard",
    "Plan",
    "RunLog",
    "Schedule",
    "Stateful",
    "Steps",
    "adamw",
    "average_gradients",
    "barrier",
    "broadcast_object",
    "compare_configs",
    "config_from_dict",
    "config_to_dict",
    "cpu_has_fast_bf16",
    "default_mixed_precision",
    "finetune",
    "flag_value",
    "freeze",
    "gather_objects",
    "get_rng_state",
    "is_distributed",
    "is_main",
    "json_text",
    "latest_checkpoint",
    "layer_scales",
    "load_checkpoint",
    "load_optimizer",
    "load_weights",
    "make_accelerator",
    "parameter_groups",
    "parse",
    "parse_config",
    "prepare_folder",
    "read_history",
    "read_json",
    "read_tensors",
    "require_same_config",
    "run_main",
    "save_checkpoint",
    "scale_rates",
    "seed_everything",
    "set_lr",
    "set_rng_state",
    "step_generator",
    "write_atomic",
    "write_json_atomic",
    "write_tensors_atomic",
]
