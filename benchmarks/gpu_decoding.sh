#!/usr/bin/env bash
# Decoding on a GPU, all that is to be proved of it, in one window of 12 minutes: rates, training steps, tests, memory.
#   benchmarks/gpu_decoding.sh OUT [STEP ...]       on an H100 or H200, in an environment with the extra `gpu`
#   REHEARSE=1 benchmarks/gpu_decoding.sh OUT [STEP ...]       the same commands on tiny input, as far as a CPU can
#   BUDGET=600 benchmarks/gpu_decoding.sh OUT       in as many seconds
# Steps, in this order, all if none is named; the first six measure what is to be reached:
#   videos rates images shards weights train-nvdec | limit tests decode soak train-split train-cpu
# Each has a limit of time and a log in OUT. One that fails does not stop the others; one whose limit is more than what is left
# of the budget is left out, and the last line names it. Rows go to OUT as well.
set -uo pipefail
out=$(realpath -m "${1:?where to}"); shift; only=" $* "; cd "$(dirname "$0")/.."; mkdir -p "$out/shards"
tiny=${REHEARSE:-0}; export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 BEVT_COMMIT=${BEVT_COMMIT:-$(git rev-parse HEAD)}
slower=$((tiny ? 6 : 1)) budget=$(( ${BUDGET:-720} * (tiny ? 6 : 1) )) failed=0 left_out=()

step() { # name, seconds, command
    local began=$SECONDS code=0 limit=$((slower * $2))
    [ "$only" = "  " ] || [[ $only = *" $1 "* ]] || return 0
    if ((SECONDS + limit > budget)); then left_out+=("$1"); return 0; fi
    timeout -k 5 "$limit" "${@:3}" >"$out/$1.log" 2>&1 || code=$?
    [ "$code" = 0 ] || failed=1
    echo "$1: $((SECONDS - began)) s of $limit, exit code $code"
    tail -n 2 "$out/$1.log" | cut -c 1-200
}

if [ "$tiny" = 1 ]; then
    tests=(--collect-only) decoders=(cpu) files=(--files 2 --seconds 0.2) videos=(2 1) images=4 steps=2
    goals=("ours, packed, fps=") soak=(--soak-row "ours, packed, fps=" --soak-clips 160)
    ways=(--way "our workers" --media h264 --batch 2 --lanes 1) images_of=(--batch 2 --lanes 1)
    recipe=(recipe=demo)
else
    tests=() decoders=(nvdec split cpu) files=(--files 16 --seconds 1) videos=(64 1) images=256 steps=300
    goals=("ours, NVDEC, raw" "ours, NVDEC, packed" "ours, NVDEC, packed, fps=" "ours, split, raw" "ours, raw")
    soak=(--soak-row "ours, NVDEC, packed, fps=")
    ways=(--media h264 packed "packed fps=3.75" hevc --batch 8 --lanes 1 8) images_of=(--batch 64 --lanes 8)
    recipe=(recipe=joint_swin_b train.micro_clips=8 train.micro_images=64 train.global_clips=8 train.global_images=64)
    recipe+=("tokenizer.weights=$out/tokenizer.safetensors")
fi

drawn="$out/videos/340x256-${videos[0]}"
training() { # decoder
    step "train-$1" 120 deepspeed --num_gpus 1 bevt_ds/pretrain.py --deepspeed_config ds_configs/zero2.json "${recipe[@]}" \
        "data.videos=$drawn/raw-*.tar" "data.images=$out/shards/image-*.tar" "data.decoder=$1" \
        "train.steps=$steps" "output_dir=$out/train-$1"
}

loader=(python -m benchmarks.loader --folder "$out/videos" --videos "${videos[@]}" --size 340x256)
step videos 60 "${loader[@]}" --prepare
words=(); for row in "${goals[@]}"; do words+=(--row "$row"); done
step rates 120 "${loader[@]}" --seconds 3 --sampling 16x8 --rounds 1 --no-soak --out "$out" "${words[@]}"
step images 25 python -m benchmarks.decode --media jpeg "${images_of[@]}" "${files[@]}" --out "$out"
step shards 30 python -c "
import sys
from pathlib import Path
from benchmarks.decode import drawn_jpeg
from benchmarks.loader_media import pack
folder, count = Path(sys.argv[1]), int(sys.argv[2])
(folder / 'media').mkdir()
for i in range(count):
    (folder / 'media' / f'{i}.jpg').write_bytes(drawn_jpeg(i))
pack(folder / 'media', folder, 'image', 'image')" "$out/shards" "$images"
step weights 25 python -c "
import sys
import torch
from safetensors.torch import save_file
from bevt_ds.model.tokenizers import DalleTokenizer
tokenizer, random = DalleTokenizer(), torch.Generator().manual_seed(0)
for weight in tokenizer.parameters():
    if weight.ndim == 4:
        torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=random)
save_file({name: value.contiguous() for name, value in tokenizer.state_dict().items()}, sys.argv[1])" "$out/tokenizer.safetensors"
training "${decoders[0]}"

[ "$tiny" = 1 ] || step limit 45 python -m benchmarks.decode --way "our NVDEC sessions" --media h264 hevc --frames 128 --stride 1 \
    --batch 32 --lanes 1 2 4 7 14 "${files[@]}" --out "$out"
step tests 75 python -m pytest -q -m gpu "${tests[@]}" tests/loader
step decode 90 python -m benchmarks.decode "${ways[@]}" "${files[@]}" --out "$out"
step soak 90 python -m benchmarks.loader --soak "$drawn" "${soak[@]}"
for decoder in "${decoders[@]:1}"; do training "$decoder"; done
echo "left out: ${left_out[*]:-nothing}"
exit $failed
