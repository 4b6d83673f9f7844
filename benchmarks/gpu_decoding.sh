#!/usr/bin/env bash
# Decoding on a GPU, all that is to be proved of it, in one window of 15 minutes: tests, rates, memory, training steps.
#   benchmarks/gpu_decoding.sh OUT [STEP ...]       on an H100 or H200, in an environment with the extra `gpu`
#   REHEARSE=1 benchmarks/gpu_decoding.sh OUT [STEP ...]       the same commands on tiny input, as far as a CPU can
# Steps, all if none is named: tests decode limit loader soak shards weights train-nvdec train-split train-cpu. Each has a
# limit of time and a log in OUT; one that fails does not stop the others. Rows go to OUT as well.
set -uo pipefail
out=$(realpath -m "${1:?where to}"); shift; only=" $* "; cd "$(dirname "$0")/.."; mkdir -p "$out/shards"
tiny=${REHEARSE:-0}; export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 BEVT_COMMIT=${BEVT_COMMIT:-$(git rev-parse HEAD)}
failed=0

step() { # name, seconds, command
    local began=$SECONDS code=0
    [ "$only" = "  " ] || [[ $only = *" $1 "* ]] || return 0
    timeout "$((tiny ? 6 * $2 : $2))" "${@:3}" >"$out/$1.log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=1
    echo "$1: $((SECONDS - began)) s, exit code $code"
    tail -n 2 "$out/$1.log" | cut -c 1-200
}

if [ "$tiny" = 1 ]; then
    tests=(--collect-only) decoders=(cpu) files=(--files 2 --seconds 0.2) videos=(2 1) clips=40 images=4 steps=2
    rows=("ours, raw" "ours, packed, fps=") soak=(--soak-row "ours, packed, fps=" --soak-clips 160)
    ways=(--way "our workers" "DALI decoders.image, CPU" --media h264 jpeg --batch 2 --lanes 1)
    recipe=(recipe=demo)
else
    tests=() decoders=(nvdec split cpu) files=(--files 16 --seconds 1) videos=(64 1) clips=64 images=256 steps=300
    rows=("ours, raw" "ours, DALI mixed, raw" "ours, NVDEC, raw" "ours, split, raw" "ours, NVDEC, packed" "ours, NVDEC, packed, fps=")
    soak=(--soak-row "ours, NVDEC, packed, fps=")
    ways=(--media h264 packed "packed fps=3.75" hevc jpeg --batch 8 --lanes 1 8 14)
    recipe=(recipe=joint_swin_b train.micro_clips=8 train.micro_images=64 train.global_clips=8 train.global_images=64)
    recipe+=("tokenizer.weights=$out/tokenizer.safetensors")
fi

step tests 90 python -m pytest -q -m gpu "${tests[@]}" tests/loader
step decode 150 python -m benchmarks.decode "${ways[@]}" "${files[@]}" --out "$out"
[ "$tiny" = 1 ] || step limit 45 python -m benchmarks.decode --way "our NVDEC sessions" --media h264 hevc --frames 128 --stride 1 \
    --batch 32 --lanes 1 2 4 7 14 "${files[@]}" --out "$out"
words=(); for row in "${rows[@]}"; do words+=(--row "$row"); done
step loader 180 python -m benchmarks.loader --folder "$out/videos" --videos "${videos[@]}" --seconds 3 --size 340x256 \
    --sampling 16x8 --rounds 1 --no-soak --out "$out" "${words[@]}"
step soak 100 python -m benchmarks.loader --soak "$out/videos/340x256-${videos[0]}" "${soak[@]}"

step shards 45 python -c "
import sys
from pathlib import Path
from benchmarks.host import shards
shards(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), '340x256')" "$out/shards" "$clips" "$images"
step weights 30 python -c "
import sys
import torch
from safetensors.torch import save_file
from bevt_ds.model.tokenizers import DalleTokenizer
tokenizer, random = DalleTokenizer(), torch.Generator().manual_seed(0)
for weight in tokenizer.parameters():
    if weight.ndim == 4:
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=random)
save_file({name: value.contiguous() for name, value in tokenizer.state_dict().items()}, sys.argv[1])" "$out/tokenizer.safetensors"
for decoder in "${decoders[@]}"; do
    step "train-$decoder" 130 deepspeed --num_gpus 1 bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json "${recipe[@]}" \
        "data.videos=$out/shards/video-*.tar" "data.images=$out/shards/image-*.tar" "data.decoder=$decoder" \
        "train.steps=$steps" "output_dir=$out/train-$decoder"
done
exit $failed
