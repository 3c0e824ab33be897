"""The one patch that lets FSDP2 run without a GPU: Accelerate turns a CPU's ranks into DDP, whatever was asked for.

Only for tests, and only in the process that calls ``apply``. What it changes: the list of devices for which Accelerate
takes ``fsdp`` seriously, and this project's own refusal of ``fsdp`` on a CPU. Whoever uses it asserts what really ran.
"""

from typing import Any


def apply() -> None:
    """Patches this process, before a trainer is made."""
    from accelerate import state
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FSDPModule
    from trl import SFTTrainer

    import spotune.sft.preflight

    make = state.AcceleratorState.__init__

    def make_with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    state.AcceleratorState.__init__ = make_with_fsdp
    prepare = SFTTrainer._prepare_for_training

    def say_what_runs(self: Any, *args: Any) -> Any:
        found = prepare(self, *args)
        assert self.is_fsdp_enabled
        assert self.accelerator.is_fsdp2
        assert isinstance(self.model, FSDPModule), type(self.model)
        print(f"FSDP runs: FSDP version {self.accelerator.state.fsdp_plugin.fsdp_version}", flush=True)
        return found

    SFTTrainer._prepare_for_training = say_what_runs
    spotune.sft.preflight.check_hardware = lambda *args: None
