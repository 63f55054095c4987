"""Which training samples mattered, in which part of the training, and how far can the answer be trusted?

The modules are exported from the notebooks in `nbs/`; this file alone is written by hand and gathers the public names.
"""
__version__ = "0.1.0"

from dit_nb.bounds import Bound, error_bound
from dit_nb.callbacks import LightningRecorder, TrainerRecorder
from dit_nb.cleansing import Cleansed, cleanse, detection, find_corrupted
from dit_nb.counterfactual import compare, leave_one_out, remove, verify
from dit_nb.data import (Samples, adult, breast_cancer, corrupt_labels, digits, emnist, fashion_mnist, fetch, idx_images,
                         mnist, newsgroups, restore_labels)
from dit_nb.dynamics import Patterns, Stages, agreement_by_pattern, patterns, phases, stages
from dit_nb.errors import calibrate, error_proxy, second_order, with_curvature
from dit_nb.estimator import influence, plan_influence
from dit_nb.explorer import Explorer, explore
from dit_nb.kinks import kink_patterns, smooth_kinks
from dit_nb.labels import LabelInfluence, label_influence
from dit_nb.plots import (plot_agreement, plot_bounds, plot_corrupted, plot_diagnosis, plot_heatmap, plot_influence, plot_opinions, plot_patterns,
                          plot_samples, plot_scores, plot_stages, plot_summary, plot_window)
from dit_nb.progress import Cancelled, Progress
from dit_nb.queries import (Query, gradient_norm_query, input_gradient_query, loss_query, margin_query, parameter_query,
                            prediction_query)
from dit_nb.recorder import Recorder, plan_recording
from dit_nb.repeats import Ensemble, ensemble, health, repeatability, repetition
from dit_nb.results import Influence, load_influence
from dit_nb.sensitivity import supervised
from dit_nb.trajectory import Run, State, check_run, open_run
from dit_nb.trust import Diagnosis, diagnose, refine

__all__ = ["Bound", "Cancelled", "Cleansed", "Diagnosis", "Ensemble", "Explorer", "Influence", "LabelInfluence", "LightningRecorder", "Patterns",
           "Progress", "Query", "Recorder", "Run", "Samples", "Stages", "State", "TrainerRecorder", "adult", "agreement_by_pattern",
           "breast_cancer", "calibrate", "check_run", "cleanse", "compare", "corrupt_labels", "detection", "diagnose", "digits", "emnist",
           "ensemble", "error_bound", "error_proxy", "explore", "fashion_mnist", "fetch", "find_corrupted", "gradient_norm_query", "health",
           "idx_images", "influence", "input_gradient_query", "kink_patterns", "label_influence", "leave_one_out", "load_influence", "loss_query",
           "margin_query", "mnist", "newsgroups", "open_run", "parameter_query", "patterns", "phases", "plan_influence", "plan_recording",
           "plot_agreement", "plot_bounds", "plot_corrupted", "plot_diagnosis", "plot_heatmap", "plot_influence", "plot_opinions", "plot_patterns",
           "plot_samples", "plot_scores", "plot_stages", "plot_summary", "plot_window", "prediction_query", "refine", "remove", "repeatability",
           "repetition", "restore_labels", "second_order", "smooth_kinks", "stages", "supervised", "verify", "with_curvature"]
