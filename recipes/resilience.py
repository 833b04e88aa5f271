"""What keeps a run on hundreds of GPUs going: the parts that the recipes for H100s add to NeMo's, and why.

- `LossGuard`: a loss that is not a number ends the run before it is saved; on all ranks at once, with a message.
- `ddp.check_for_nan_in_grad` off: Megatron's check ends one rank alone; the others wait for it until NCCL gives up.
- `hang_detection`: under `ft_launcher`, a rank that is silent too long has all ranks restarted; else nothing.
- `straggler_report`: one slow GPU slows all; the run is not ended, because a person has to judge.
- `SaveOnSignal`: a job that is taken away saves after its present step, and loses none.
- `RetainedCheckpoints`: see `KEEP_LAST`.

Asynchronous checkpoints are on in NeMo's recipes already (`strategy.ckpt_async_save`): training waits only for the
copy to host memory.
"""

import nemo_run as run

from nemo_upcycle.recipes.common import checkpoints
from nemo_upcycle.trainers.nemo.loss_guard import LossGuard
from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal, StopOnSignal
from nemo_upcycle.trainers.nemo.watchers import hang_detection, straggler_report


#: Checkpoints kept: the last one, and the one before it. A loss that went wrong is often seen only after the next
#: save, and a file that storage lost must not cost the run. More are a matter of room: one of an upcycled 8B model
#: takes 619 GiB, and while one is written there is one more. `log.ckpt.keep_every=5000` keeps some for good.
KEEP_LAST = 2
#: Steps between two checkpoints: about half an hour of Llama 3 8B E8T2 on 512 H100 (derived).
CHECKPOINT_STEPS = 1000


def resilient(recipe: run.Partial) -> run.Partial:
    """Add what keeps a long run going to a recipe for H100s, in place.

    Args:
        recipe: returned by `start_from`.

    Returns:
        The recipe.
    """
    recipe.log.ckpt = checkpoints(CHECKPOINT_STEPS, keep_last=KEEP_LAST)
    recipe.trainer.strategy.ddp.check_for_nan_in_grad = False
    # The guard comes before what writes a step's metrics or a checkpoint. Saving on a signal comes after the step's
    # metrics; the callback that ends at once follows, because it restores the handlers that both replace.
    added = [run.Config(hang_detection), run.Config(straggler_report), run.Config(SaveOnSignal)]
    others = [item for item in recipe.trainer.callbacks if item.__fn_or_cls__ is not StopOnSignal]
    recipe.trainer.callbacks = [run.Config(LossGuard), *others, *added, run.Config(StopOnSignal)]
    return recipe
