"""How does a trainer push a model without its zeros, and a dense one to where such a model is?"""

import contextlib
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparse_hf.storage.compressed_folder import compressed_copy
from sparse_hf.storage.push_folder import COMPRESSED_WEIGHTS, delete_outdated_weights, push_folder
from sparse_hf.training.trainer_card import complete_card


if TYPE_CHECKING:
    from sparse_hf.training.trainer import SparseTrainer


LEFT_HERE = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")  # as the Trainer does


def holds_compressed(trainer: "SparseTrainer", token: str | None, revision: str | None) -> bool:
    """Whether there are compressed weights in the trainer's repository; only known to the process that pushes."""
    if not trainer.is_world_process_zero():
        return False
    api = HfApi(token=token or trainer.args.hub_token)
    entries = api.list_repo_tree(trainer.hub_model_id, revision=revision or trainer.args.hub_revision)
    return any(COMPRESSED_WEIGHTS.fullmatch(entry.path) for entry in entries)


def push_in_one_commit(
    trainer: "SparseTrainer",
    compressed: bool | Literal["zstd"],
    commit_message: str | None,
    blocking: bool,
    token: str | None,
    revision: str | None,
    **card: object,
) -> CommitInfo | Future | None:
    """What the Trainer's `push_to_hub` does, but as one commit that also deletes the weights of the other kind."""
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    own = getattr(trainer.model, "model_tags", None) or []
    given = card.pop("tags", None) or []
    tags = [*([given] if isinstance(given, str) else given), *own]
    name = card.pop("model_name", None) or trainer.hub_model_id.rpartition("/")[2]
    trainer.create_model_card(model_name=name, tags=list(dict.fromkeys(tags)) or None, **card)
    trainer._finish_current_push()
    with contextlib.ExitStack() as stack:
        folder = Path(trainer.args.output_dir)
        if compressed:
            folder = stack.enter_context(compressed_copy(folder, compressed == "zstd"))
            complete_card(trainer, folder, folder)
        until_sent = stack.pop_all()

    def send() -> CommitInfo:
        with until_sent:
            return push_folder(
                folder,
                trainer.hub_model_id,
                None,
                token or trainer.args.hub_token,
                commit_message or "Upload by sparse_hf",
                LEFT_HERE,
                revision or trainer.args.hub_revision,
            )

    return send() if blocking else HfApi().run_as_future(send)


def delete_outdated_after(trainer: "SparseTrainer", pushes: list[Future]) -> Future:
    """Once the Trainer's own pushes are through, delete what a loader could take for the new weights.

    The Trainer pushes along the way without deleting anything. Between its commit and ours the compressed weights of
    an earlier push lie unread beside the new ones.

    Args:
        pushes: of the output folder first; should one fail, nothing is deleted.
    """
    pushed = [path.name for path in Path(trainer.args.output_dir).iterdir()]

    def delete() -> CommitInfo | None:
        for push in pushes:
            push.result()
        return delete_outdated_weights(trainer.hub_model_id, pushed, trainer.args.hub_token, trainer.args.hub_revision)

    return HfApi().run_as_future(delete)
