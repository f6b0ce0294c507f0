"""Names that keys have elsewhere, and what stands for them here; said where somebody gives a key that is unknown."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

BATCH = (
    "wake.batch (sequences per wake step), sleep.batch (sequences per step of a round, over all ranks together) and "
    "base.batch (sequences per step and rank of base pretraining)"
)
STEP_SIZE = (
    "levels.NAME.optimizer.lr (of a level, awake), sleep.optimizer.lr (of the pool, for all levels) and base.lr (of "
    "the base)"
)
LENGTH = "the stream is read once, so it decides how long a run is: stream.max_source_bytes bounds it per source"
NAMES: Tuple[Tuple[str, str], ...] = (
    ("batch_size train_batch_size bs per_device_train_batch_size micro_batch_size global_batch_size", f"use {BATCH}"),
    ("learning_rate lr max_lr peak_lr step_size", f"use {STEP_SIZE}"),
    ("seed random_seed data_seed manual_seed rng_seed", "use run.seed, which decides weights, schedules and samplers"),
    (
        "epochs num_epochs num_train_epochs max_epochs n_epochs",
        f"there is no counterpart: {LENGTH}; sleep.epochs is a budget, FLOPs in full training steps per streamed token",
    ),
    (
        "max_steps num_steps total_steps max_iters train_iters num_train_steps iterations",
        f"{LENGTH}; sleep.max_steps bounds the steps of one round, base.tokens says how long a base is pretrained",
    ),
    ("max_tokens total_tokens train_tokens num_tokens", f"{LENGTH}; base.tokens is for the base"),
    (
        "sequence_length seq_len seq_length max_length max_seq_length max_seq_len block_size context_length n_ctx "
        "max_position_embeddings context_size",
        "use model.context, the tokens per sequence; model.window is how far attention sees back",
    ),
    (
        "output_dir out_dir save_dir checkpoint_dir logging_dir log_dir run_dir workdir",
        "use run.root, the folder of all runs, and run.name, the folder of this one below it",
    ),
    ("run_name experiment_name job_name exp_name", "use run.name; tracking.experiment is MLflow's experiment"),
    (
        "dtype precision torch_dtype mixed_precision amp autocast bf16 fp16 fp32 half",
        "use compute.precision=fp32 or bf16 (there is no fp16); pool.bf16_weights keeps the pool's weights in bf16",
    ),
    (
        "save_interval save_steps save_every checkpoint_interval save_freq save_strategy ckpt_every",
        "use wake.checkpoint_every (wake steps between checkpoints of the learner) and pool.checkpoint_every (steps "
        "of a round); every round ends in a release anyway",
    ),
    (
        "save_total_limit keep_last_n max_checkpoints",
        "there is no counterpart: every release is kept, so that a run can be rolled back to it",
    ),
    (
        "resume resume_from_checkpoint resume_from continue",
        "there is no counterpart: the same command with the same run.name continues a run",
    ),
    (
        "warmup_steps warmup warmup_ratio num_warmup_steps warmup_iters lr_warmup_steps",
        "use sleep.warmup, the steps over which the pool's step size rises, once in a run",
    ),
    (
        "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
        "use sleep.schedule=constant or cosine; stream.schedule is the order of the sources",
    ),
    (
        "wandb wandb_project use_wandb report_to tensorboard logger project comet",
        "runs are tracked by MLflow alone: tracking.uri names its server, tracking.experiment the experiment",
    ),
    ("mlflow mlflow_tracking_uri tracking_uri", "use tracking.uri; empty is a database beside the runs"),
    (
        "num_workers dataloader_num_workers workers num_proc prefetch_factor",
        "there is no counterpart: the learner reads its text itself; pool.ranks is the number of processes that sleep, "
        "compute.threads the CPU threads of each process",
    ),
    ("num_threads n_threads threads", "use compute.threads, per process"),
    ("weight_decay wd", "use levels.NAME.optimizer.weight_decay (awake) and sleep.optimizer.weight_decay (the pool)"),
    ("optimizer optim optimizer_type optimizer_name", "use levels.NAME.optimizer.name and sleep.optimizer.name"),
    (
        "adam_beta1 adam_beta2 betas beta1 beta2 momentum adam_epsilon eps",
        "use beta1, beta2 and eps of an optimizer, for instance sleep.optimizer.beta2 or levels.NAME.optimizer.beta1",
    ),
    (
        "dataset dataset_name data data_path data_dir train_file train_data train_files data_files corpus dataset_path",
        "use stream.path, a directory or glob of .txt, .md, .jsonl and .parquet; stream.sources chooses",
    ),
    (
        "validation_file eval_file test_file valid_file eval_dataset validation_split",
        "there is no counterpart: held-out text is split off, or taken from files named valid* or test*; "
        "stream.probe_bytes says how much",
    ),
    ("text_column text_key", "use stream.text_field"),
    ("shuffle shuffle_buffer shuffle_buffer_size", "use stream.schedule=mixed, which mixes all sources"),
    (
        "model_name_or_path model_name pretrained pretrained_model_name_or_path init_from base_model checkpoint "
        "checkpoint_path load_checkpoint",
        "use base.checkpoint, a release directory of a run; a transformers checkpoint comes in by `circadian import`, "
        "and is no base of a run",
    ),
    ("tokenizer_name tokenizer_path tokenizer_name_or_path", "use tokenizer.path, with tokenizer.kind=bpe"),
    ("vocab_size", "use tokenizer.vocab_size, for tokenizer.kind=bpe; the model takes it from there"),
    (
        "gradient_accumulation_steps grad_accum accumulate_grad_batches accumulation_steps accumulate",
        "use pool.micro_batch, the sequences per pass of a rank; gradients are summed until its share of sleep.batch "
        "is through",
    ),
    (
        "max_grad_norm grad_clip clip_grad gradient_clip_val grad_norm_clip gradient_clipping clip_grad_norm",
        "use levels.NAME.optimizer.clip (per level, awake) and sleep.optimizer.clip (the pool)",
    ),
    (
        "gradient_checkpointing activation_checkpoint recompute",
        "use pool.activation_checkpointing, for the pool's students",
    ),
    ("device gpu use_cuda cuda accelerator no_cuda use_cpu", "use compute.device=auto, cpu or cuda"),
    (
        "world_size num_gpus n_gpu gpus devices nproc_per_node num_processes nodes num_nodes",
        "use pool.ranks, the processes of the pool; ray.gpus is how many GPUs each of them asks for",
    ),
    ("deepspeed zero zero_stage fsdp sharding", "use pool.zero_stage=0 to 3"),
    ("torch_compile compile use_compile", "use compute.compile"),
    (
        "log_interval logging_steps log_every log_steps log_freq log_every_n_steps",
        "there is no counterpart: events.jsonl is written throughout; report.look_every is for measurements",
    ),
    (
        "eval_steps eval_interval eval_every evaluation_strategy eval_strategy val_check_interval eval_freq eval_iters",
        "use report.look_every, the tokens between two looks at the served model; the gate measures after every round",
    ),
    ("hidden_size d_model n_embd dim embed_dim model_dim hidden_dim", "use model.dim"),
    ("num_layers n_layer n_layers num_hidden_layers depth layers", "use model.blocks"),
    ("num_heads n_head n_heads num_attention_heads heads", "use model.heads"),
    ("intermediate_size ffn_dim d_ff mlp_ratio mlp_dim", "use levels.NAME.width, the hidden units of a level's MLP"),
    ("rope_theta", "use model.rope_base"),
    ("sliding_window attention_window window_size", "use model.window"),
    ("dropout attention_dropout hidden_dropout", "there is no counterpart: models here have no dropout"),
    (
        "replay replay_ratio buffer_size replay_buffer_size memory_size",
        "use sleep.recent (the rest of a batch is replayed), sleep.replay_bytes (how much of the past is held) and "
        "wake.replay (where the learner replays)",
    ),
)
"""Names in one line each, and what to say of them."""


def usual(name: str) -> Optional[str]:
    """What stands here for a name that is usual elsewhere, None where it is not known."""
    return _TABLE.get(name.lower().replace("-", "_"))


def _table() -> Dict[str, str]:
    found: Dict[str, str] = {}
    for names, says in NAMES:
        for name in names.split():
            assert name not in found, name
            found[name] = says
    return found


_TABLE = _table()
