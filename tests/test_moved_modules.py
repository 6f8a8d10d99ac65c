"""What could be imported before the modules were put into folders can be imported from where it was."""

import importlib
import sys
import warnings

import pytest

from loqt_peft._moved import MOVED, MOVED_NAMES


# all public names, imported ones left out, of the modules of the last version without folders: of those that have moved
OF_MOVED_MODULES = {
    "checkpoint": "ERROR FORMAT_VERSION SAMPLE_SIZE SEAL_SIZE Seal TENSORS base_storage_code canonical checksum "
    "get_last_checkpoint newer_version sample saved_base_quantization seal_adapter verify_adapter",
    "closed_form": "BASES CLOSED_FORM_TYPES ClosedForm DTYPES ESTIMATED_PROJECTIONS FIELDS Linear METHODS MemoryOptions "
    "ModelShape OPTIMIZERS load_config",
    "compensation": "Compensated compensate",
    "estimate_cli": "FIELDS GB add_estimate_parser estimate_command estimate_text plan_text",
    "functional": "LoQTLinear",
    "layer": "Linear LoQTLayer NUM_UPDATES Projected Switch UPDATE_PENDING dense_layer source_class",
    "model_card": "ARXIV_ID BASE_MODEL_TAG CARD_NAME SECTION add_loqt_section describe_saved_adapter keep_loqt_section "
    "loqt_section write_model_card",
    "optim": "DISTRIBUTED Optimizer8bit PerLayerOptimizer SCALER check_training_arguments per_layer per_layer_optimizer "
    "remove_hooks",
    "performance": "COUNTED PerformanceCallback callback_handler",
    "projection": "MIN_OVERSAMPLING OF_GRADIENT OVERSAMPLING_SHARE PROJECTIONS RIDGE captured_energy expand is_right "
    "orthonormalize project projection_shape random_projection restrict sketch_width squared_norm "
    "trainable_shape",
    "quantization": "BLOCKSIZE DenseFormat FourBitFormat NESTED_BLOCKSIZE QUANT_TYPES storage_format undo_cpu_packing",
    "schedule": "INTERVAL_SCHEDULES UpdateSchedule staggered_offsets",
    "simulation": "DEVICE FEW_LAYERS HOST Peak Run StorageCounter aten build_model measure_on_cpu simulate with_layers",
    "target_modules": "TARGET_MODULES_MAPPING",
    "update": "FIRST_MOMENTS LoQTUpdate MOMENT_BLOCKSIZE active_layers begin_step cancel_step end_step loqt_layers",
}
# and of those that are still there
OF_OTHER_MODULES = {
    "__main__": "AUTO_CLASSES DTYPES base_class build_parser copy_tokenizer export_command load_base main parse_rank "
    "return_freed_memory trained_quantization",
    "callback": "LoQTTrainerCallback REFUSED",
    "config": "LoQTConfig OPTIMIZER_STATES PAPER RETAIN_BASE UPDATE_MODES",
    "export": "ExportReport FORMATS check_output_dir check_rank export to_4bit to_dense",
    "memory": "CONTEXT_BYTES FRAGMENTATION LARGEST_PLANNED_BATCH Lever MemoryEstimate MemoryPlan PLANNED_OPTIONS "
    "SMALLEST_PLANNED_RANK UNITS closed_form_peak estimate_memory parse_bytes plan_memory required_bytes",
    "model": "LoQTModel SUPPORTED full_rank_parameters",
}


@pytest.mark.parametrize("name", OF_MOVED_MODULES)
def test_a_moved_module_has_all_of_its_names_and_warns(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"loqt_peft.{name}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"loqt_peft\.{name} has moved to loqt_peft\.{MOVED[name][0]}"):
        module = importlib.import_module(f"loqt_peft.{name}")
    assert [missing for missing in OF_MOVED_MODULES[name].split() if not hasattr(module, missing)] == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_no_moved_module_is_forgotten():
    assert OF_MOVED_MODULES.keys() == MOVED.keys()


@pytest.mark.parametrize("name", OF_OTHER_MODULES)
def test_a_module_that_has_stayed_has_all_of_its_names(name):
    module, moved = importlib.import_module(f"loqt_peft.{name}"), MOVED_NAMES.get(name, {})
    for public in OF_OTHER_MODULES[name].split():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = getattr(module, public)
        if public in moved:
            room, _, new = moved[public].rpartition(".")
            assert value is getattr(importlib.import_module(f"loqt_peft.{room}"), new)
            assert [str(w.message) for w in caught] == [
                f"{public} of loqt_peft.{name} has moved: it is loqt_peft.{moved[public]}."
            ]
        else:
            assert caught == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018
