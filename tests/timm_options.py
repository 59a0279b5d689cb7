"""Options of timm's own train.py with their groups and defaults, as its parser gives them (timm 1.0.31).

`observes` notes which test observes which option.
"""

TIMM_OPTIONS = {
    'options': {
        '--kd-model-name': None, '--kd-distill-type': 'logit', '--kd-loss-type': 'kl', '--distill-loss-weight': None,
        '--task-loss-weight': None, '--kd-temperature': 4.0, '--kd-student-feature-dim': None,
        '--kd-teacher-feature-dim': None, '--kd-token-distill-type': 'soft',
    },
    'Dataset parameters': {
        '--data-dir': None, '--dataset': '', '--train-split': 'train', '--val-split': 'validation',
        '--train-num-samples': None, '--val-num-samples': None, '--dataset-download': False, '--class-map': '',
        '--input-img-mode': None, '--input-key': None, '--target-key': None, '--dataset-trust-remote-code': False,
    },
    'Model parameters': {
        '--model': 'resnet50', '--pretrained': False, '--pretrained-path': None, '--initial-checkpoint': '',
        '--resume': '', '--no-resume-opt': False, '--num-classes': None, '--gp': None, '--img-size': None,
        '--in-chans': None, '--input-size': None, '--crop-pct': None, '--mean': None, '--std': None,
        '--interpolation': '', '--batch-size': 128, '--validation-batch-size': None, '--channels-last': False,
        '--fuser': '', '--grad-accum-steps': 1, '--grad-checkpointing': False, '--fast-norm': False,
        '--model-kwargs': {}, '--head-init-scale': None, '--head-init-bias': None, '--torchcompile-mode': None,
        '--torchscript': False, '--torchcompile': None,
    },
    'Device parameters': {
        '--device': 'cuda', '--amp': False, '--amp-dtype': 'float16', '--model-dtype': None, '--no-ddp-bb': False,
        '--synchronize-step': False, '--local_rank': 0, '--device-modules': None,
    },
    'Optimizer parameters': {
        '--opt': 'sgd', '--opt-eps': None, '--opt-betas': None, '--momentum': 0.9, '--weight-decay': 2e-5,
        '--clip-grad': None, '--clip-mode': 'norm', '--layer-decay': None, '--layer-decay-min-scale': 0,
        '--layer-decay-no-opt-scale': None, '--opt-kwargs': {},
    },
    'Learning rate schedule parameters': {
        '--sched': 'cosine', '--sched-on-updates': False, '--lr': None, '--lr-base': 0.1, '--lr-base-size': 256,
        '--lr-base-scale': '', '--lr-noise': None, '--lr-noise-pct': 0.67, '--lr-noise-std': 1.0,
        '--lr-cycle-mul': 1.0, '--lr-cycle-decay': 0.5, '--lr-cycle-limit': 1, '--lr-k-decay': 1.0,
        '--warmup-lr': 1e-5, '--min-lr': 0, '--epochs': 300, '--epoch-repeats': 0.0, '--start-epoch': None,
        '--decay-milestones': [90, 180, 270], '--decay-epochs': 90, '--warmup-epochs': 5, '--warmup-prefix': False,
        '--cooldown-epochs': 0, '--patience-epochs': 10, '--decay-rate': 0.1,
    },
    'Augmentation and regularization parameters': {
        '--no-aug': False, '--train-crop-mode': None, '--scale': [0.08, 1.0], '--ratio': [3 / 4, 4 / 3],
        '--hflip': 0.5, '--vflip': 0.0, '--color-jitter': 0.4, '--color-jitter-prob': None, '--grayscale-prob': None,
        '--gaussian-blur-prob': None, '--aa': None, '--aug-repeats': 0, '--aug-splits': 0, '--jsd-loss': False,
        '--bce-loss': False, '--bce-sum': False, '--bce-target-thresh': None, '--bce-pos-weight': None,
        '--reprob': 0.0, '--remode': 'pixel', '--recount': 1, '--resplit': False, '--mixup': 0.0, '--cutmix': 0.0,
        '--cutmix-minmax': None, '--mixup-prob': 1.0, '--mixup-switch-prob': 0.5, '--mixup-mode': 'batch',
        '--mixup-off-epoch': 0, '--smoothing': 0.1, '--train-interpolation': 'random', '--drop': 0.0,
        '--drop-connect': None, '--drop-path': None, '--drop-block': None,
    },
    'Batch norm parameters': {
        '--bn-momentum': None, '--bn-eps': None, '--sync-bn': False, '--dist-bn': 'reduce', '--split-bn': False,
    },
    'Model exponential moving average parameters': {
        '--model-ema': False, '--model-ema-force-cpu': False, '--model-ema-decay': 0.9998,
        '--model-ema-warmup': False,
    },
    'Miscellaneous parameters': {
        '--seed': 42, '--worker-seeding': 'all', '--log-interval': 50, '--val-interval': 1, '--recovery-interval': 0,
        '--checkpoint-hist': 10, '--workers': 4, '--save-images': False, '--pin-mem': False, '--no-prefetcher': False,
        '--output': '', '--experiment': '', '--eval-metric': 'top1', '--tta': 0, '--use-multi-epochs-loader': False,
        '--log-wandb': False, '--wandb-project': None, '--wandb-tags': [], '--wandb-resume-id': '',
        '--train-img-sizes': None, '--train-batch-sizes': None, '--train-size-probs': None,
        '--train-size-schedule': 'constant', '--train-size-schedule-spread': 0.65, '--train-size-random-mix': 0.1,
        '--train-batches-per-epoch': None, '--variable-batch-loss-scale': 'none', '--naflex-loader': False,
        '--naflex-train-seq-lens': [128, 256, 576, 784, 1024], '--naflex-max-seq-len': 576,
        '--naflex-patch-sizes': None, '--naflex-patch-size-probs': None, '--naflex-loss-scale': 'linear',
        '--naflex-patchify-channels-first': False,
    },
}

ALL = {name: default for options in TIMM_OPTIONS.values() for name, default in options.items()}
OBSERVED = {}


def observes(*options):
    """The decorated test is the observable of these options of timm's."""
    def register(test):
        for option in options:
            assert option in ALL, f'timm has no {option}'
            OBSERVED[option] = test.__name__
        return test
    return register


def dest(option):
    return option[2:].replace('-', '_')
