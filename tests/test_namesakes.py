"""Every module has a test: its namesake in the mirrored tree, or one that is named here."""

from pathlib import Path

import brain

TESTS = Path(__file__).parent
ROOT = Path(brain.__file__).parents[1]

COVERED = (
    ("compiled/test_blocks.py", "compiled", "matrix"),
    ("brain/chat/test_template.py", "brain/chat", "render"),
    ("brain/checkpoints/test_folder.py", "brain/checkpoints", "checkpoint hf_config llama_names"),
    ("brain/checkpoints/test_folder.py", "brain/checkpoints", "packing safetensors_file stored"),
    ("brain/checkpoints/test_hub.py", "brain/checkpoints", "hub_files sources"),
    ("brain/checkpoints/test_gguf_file.py", "brain/checkpoints", "gguf_header"),
    ("brain/checkpoints/test_wheel.py", "brain/machine", "built_folder integrity"),
    ("brain/config/test_overrides.py", "brain/config", "compose"),
    ("brain/measure/test_bench.py", "brain/measure/bench", "command comparison contestants"),
    ("brain/measure/test_bench.py", "brain/measure/bench", "engine job llama_cpp_command progress"),
    ("brain/measure/test_bench.py", "brain/measure/bench", "memory_reader ours plots request"),
    ("brain/measure/test_bench.py", "brain/measure/bench", "results tables timed"),
    ("brain/measure/test_bench.py", "brain/measure/bench", "transformers_peer"),
    ("brain/measure/test_bench.py", "brain/tasks", "bench"),
    ("brain/measure/test_evaluation.py", "brain/measure/evaluation", "contestants endurance"),
    ("brain/measure/test_evaluation.py", "brain/measure/evaluation", "facts fluency measures"),
    ("brain/measure/test_evaluation.py", "brain/measure/evaluation", "mending plots retrieval"),
    ("brain/measure/test_evaluation.py", "brain/measure/evaluation", "paired parts reading"),
    ("brain/measure/test_evaluation.py", "brain/measure/evaluation", "request texts"),
    ("brain/measure/test_evaluation.py", "brain/tasks", "eval"),
    ("brain/measure/test_gguf_writer.py", "brain/measure/bench", "gguf_writer llama_cpp_peer"),
    ("brain/measure/test_golden.py", "brain/measure/golden", "cases check files judge"),
    ("brain/measure/test_golden.py", "brain/measure/golden", "reference replay script"),
    ("brain/measure/test_golden.py", "brain/measure/golden", "seeded write"),
    ("brain/measure/test_golden.py", "brain/tasks", "golden"),
    ("brain/measure/test_profiling.py", "brain/measure/profiling", "picture ranges trace"),
    ("brain/measure/test_profiling.py", "brain/tasks", "profile"),
    ("brain/policies/test_policies.py", "brain/policies", "brightness h2o keydiff novelty"),
    ("brain/policies/test_policies.py", "brain/policies", "random sink_recent surprise tova"),
    ("brain/record/test_run_record.py", "brain/config", "older"),
    ("brain/record/test_run_record.py", "brain/record", "lock numbered_saves run_files"),
    ("brain/test_app.py", "brain", "errors terminal"),
    ("brain/test_app.py", "brain/config", "settings"),
    ("brain/test_tokens.py", "brain/tokenizers", "byte_level protobuf sentencepiece_model"),
    ("brain/test_tokens.py", "brain/tokenizers", "tokenizer_json vocabulary"),
    ("compiled/test_patch.py", "compiled", "plan"),
    ("compiled/test_read_cpu.py", "compiled", "cpu_library"),
    ("compiled/test_read_cuda.py", "compiled", "kernel_launch read_kernels"),
    ("compiled/test_tick_cuda.py", "compiled", "tick_kernels"),
    ("fuzz/test_files.py", "brain", "files"),
    ("fuzz/test_lines_and_folders.py", "brain/config", "type_check"),
    ("invariants/test_I03_mirror_and_cache_agree.py", "brain", "mirror"),
    ("invariants/test_I04_a_patch_is_whole_or_not_at_all.py", "brain", "actions edits"),
)
"""Test files, and the modules without a namesake that each of them covers."""

MODULES = {
    str(path.relative_to(ROOT).with_suffix(""))
    for room in ("brain", "compiled")
    for path in (ROOT / room).rglob("*.py")
    if path.name != "__init__.py"
}
NAMED = {f"{room}/{name}": test for test, room, names in COVERED for name in names.split()}


def namesake(module: str) -> Path:
    room, _, name = module.rpartition("/")
    return TESTS / room / f"test_{name}.py"


def test_every_module_has_a_test() -> None:
    untested = {module for module in MODULES if not namesake(module).exists()}
    assert untested <= NAMED.keys(), sorted(untested - NAMED.keys())


def test_what_is_named_exists() -> None:
    assert NAMED.keys() <= MODULES, sorted(NAMED.keys() - MODULES)
    missing = {test for test in NAMED.values() if not (TESTS / test).is_file()}
    assert not missing, sorted(missing)


def test_no_module_with_a_namesake_is_named() -> None:
    both = sorted(module for module in NAMED if namesake(module).exists())
    assert not both, both
