# SPDX-License-Identifier: Apache-2.0
"""Every causal model class of transformers under adapters, ours and PEFT's, on the same small random models.

The classes are those of transformers' own table (`MODEL_FOR_CAUSAL_LM_MAPPING`), built from their configurations
shrunk by `small_configs`. For each one and for each library, with adapters on every linear layer but the head:

    convert                  the logits are those of the base
    one step                 each adapter that was called has a gradient, finite and not all zero
    off                      after the step the adapters change the logits; switched off, the base's come back
    save and load            into another copy of the base: the same logits

    python benchmarks/architectures.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_configs import small_configs
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, disable_adapters, load_adapter, save_adapter
from lightning_lora.nn.linear import LoRALinear

IDS = torch.arange(32).view(2, 16) * 7 % 97 + 11
SECONDS = 60  # for one class
LARGEST = 2e7  # parameters of a small model


class Ours:
    """This package."""

    def convert(self, model: nn.Module) -> nn.Module:
        """Adapters of rank 4 on every linear but the head."""
        apply_lora(model, LoRAConfig(r=4, lora_alpha=8))
        return model

    def layers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
        """By name, each adapted layer and its B."""
        return {n: (m, m.lora_B) for n, m in model.named_modules() if isinstance(m, LoRALinear)}

    def off(self, model: nn.Module) -> Any:
        """The context in which the model is its base."""
        return disable_adapters(model)

    def save(self, model: nn.Module, folder: Path) -> None:
        """An adapter folder."""
        save_adapter(model, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The folder over a fresh base."""
        load_adapter(model, folder)
        return model


class Pefts:
    """PEFT with the same request."""

    def convert(self, model: nn.Module) -> nn.Module:
        """Adapters of rank 4 on every linear but the head."""
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    def layers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
        """By name, each adapted layer and its B."""
        found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_B") and "default" in m.lora_B}
        return {n: (m, m.lora_B["default"].weight) for n, m in found.items()}

    def off(self, model: nn.Module) -> Any:
        """The context in which the model is its base."""
        return model.disable_adapter()

    def save(self, model: nn.Module, folder: Path) -> None:
        """An adapter folder."""
        model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The folder over a fresh base."""
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder)


LIBRARIES: dict[str, Ours | Pefts] = {"ours": Ours(), "peft": Pefts()}


def causal_classes() -> dict[str, tuple[type, type]]:
    """By the model class's name, configuration class and model class, as transformers lists them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found: dict[str, tuple[type, type]] = {}
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        # some tables name the configuration of a larger model, of which the class reads a part
        found.setdefault(model_class.__name__, (model_class.config_class or config_class, model_class))
    return dict(sorted(found.items()))


def logits_of(model: nn.Module) -> Tensor:
    """One evaluation; random parts of the model draw the same numbers each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def builder(config_class: type, model_class: Any) -> Callable[[], nn.Module]:
    """Makes the same small random model at each call.

    Raises:
        RuntimeError: No small configuration gives a model that can be called and trained.
    """
    problems = []
    try:
        for make in small_configs(config_class):
            try:

                def build(make: Callable[[], Any] = make) -> nn.Module:
                    torch.manual_seed(0)
                    return model_class(make()).float()

                with torch.device("meta"):
                    count = sum(p.numel() for p in model_class(make()).parameters())
                if count > LARGEST:
                    raise ValueError(f"{count / 1e6:.0f} M parameters")
                logits = logits_of(build())
                if not logits.isfinite().all():
                    raise ValueError("its logits are not finite")
                if not torch.equal(logits, logits_of(build())):
                    raise ValueError("two models from one seed differ")
                return build
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")
    except Exception as error:
        problems.append(f"{type(error).__name__}: {error}")
    raise RuntimeError(problems[0])


def trial(library: Ours | Pefts, build: Callable[[], nn.Module]) -> str:
    """What goes wrong with one library; empty if nothing does."""
    base = logits_of(build())
    stage = "convert"
    try:
        model = library.convert(build())
        if not close(logits_of(model), base):
            return "convert: other logits than the base's"
        stage = "step"
        problem = one_step(library, model)
        if problem:
            return f"step: {problem}"
        stage = "off"
        tuned = logits_of(model)
        if close(tuned, base):
            return "off: the step changed nothing"
        with library.off(model):
            if not close(logits_of(model), base):
                return "off: the base does not come back"
        with tempfile.TemporaryDirectory() as folder:
            stage = "save"
            library.save(model, Path(folder) / "adapter")
            stage = "load"
            loaded = library.load(build(), Path(folder) / "adapter")
            if not close(logits_of(loaded), tuned):
                return "load: other logits than were saved"
    except Exception as error:
        return f"{stage}: {type(error).__name__}: {error}"
    return ""


def one_step(library: Ours | Pefts, model: nn.Module) -> str:
    """Forward, loss, backward, an update; what is wrong with the gradients, empty if nothing is."""
    layers, called = library.layers(model), set()
    if not layers:
        return "nothing is adapted"
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, (m, _) in layers.items()]
    torch.manual_seed(0)
    logits = model.train()(input_ids=IDS).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    for name in (name for name in layers if name in called):
        gradient = layers[name][1].grad
        if gradient is None:
            return f"{name} has no gradient"
        if not gradient.isfinite().all():
            return f"{name} has a gradient that is not finite"
        if not gradient.any():
            return f"{name} has a gradient of zero"
    if not called:
        return "no adapter was called"
    with torch.no_grad():
        for _, B in layers.values():
            if B.grad is not None:
                B -= 0.1 * B.grad / B.grad.norm().clamp(min=1e-12)
    return ""


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal to 1e-5, relative."""
    return float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


def judge(name: str) -> dict[str, str]:
    """Both libraries' results for one class; under "build" why there is no small model of it."""
    config_class, model_class = causal_classes()[name]
    try:
        build = builder(config_class, model_class)
    except RuntimeError as error:
        return {"build": str(error)}
    return {kind: trial(library, build) for kind, library in LIBRARIES.items()}


def judge_apart(name: str) -> dict[str, str]:
    """`judge` in a process of its own, which may hang or die."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sender.send(judge(name))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else {"build": f"took more than {SECONDS} s"}
    except EOFError:
        return {"build": "the process died"}
    finally:
        process.kill()
        process.join()


def table(results: dict[str, dict[str, str]]) -> str:
    """One row for each class, the reason where it is not ok."""
    rows = ["| class | ours | peft |", "|---|---|---|"]
    for name, result in results.items():
        cells = [result[k] for k in LIBRARIES] if "build" not in result else [f"not built: {result['build']}", ""]
        ok = ["ok" if not cell and "build" not in result else cell for cell in cells]
        rows.append(f"| {name} | " + " | ".join(one_line(cell) for cell in ok) + " |")
    return "\n".join(rows)


def one_line(text: str, width: int = 110) -> str:
    """A reason on one line of a table."""
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def counts(results: dict[str, dict[str, str]]) -> dict[str, int]:
    """How many classes there are, how many build small, and how many pass with each library."""
    built = [result for result in results.values() if "build" not in result]
    passed = {kind: sum(not result[kind] for result in built) for kind in LIBRARIES}
    return {"classes": len(results), "built": len(built), **passed}


def main() -> None:
    """Run all, print the table and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="names of model classes")
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import peft
    import transformers

    begin, results = time.perf_counter(), {}
    for name in args.only or causal_classes():
        results[name] = judge_apart(name)
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    print(table(results))
    found = counts(results)
    print(
        f"{found['classes']} classes, {found['built']} build small; ours {found['ours']}, PEFT {found['peft']} "
        f"({time.perf_counter() - begin:.0f} s)"
    )
    if args.json:
        args.json.write_text(json.dumps({"counts": found, "results": results}, indent=1))


if __name__ == "__main__":
    main()
