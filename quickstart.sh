#!/usr/bin/env bash
# The whole job on the embedded default: no GPU, no login. Ends in <output_path>/report.md and spider.png.
# A finished step is skipped when the command is run again.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    cat <<'USAGE'
usage: bash quickstart.sh [--NAME=VALUE ...]
  --output_path=outputs/quickstart   where everything goes
  --prompts=32         prompts per split that are sampled (192 train and 48 test are there)
  --best_of_n=2        completions per prompt
  --max_new_tokens=48  longest completion
  --train_batch_size=4 pairs per optimizer step, a multiple of 4
  --max_epochs=1       passes over the pairs
  --learning_rate=2e-5
  --beta=0.1           strength of the KL leash (the paper's 0.01 needs far more steps to show)
  --kldpo_tau=0.05
  --wdpo_rho=0.01
  --seed=42
USAGE
}

output_path=outputs/quickstart prompts=32 best_of_n=2 max_new_tokens=48 train_batch_size=4 max_epochs=1
learning_rate=2e-5 beta=0.1 kldpo_tau=0.05 wdpo_rho=0.01 seed=42
for word in "$@"; do
    case "$word" in
        -h | --help)
            usage
            exit
            ;;
        --output_path=* | --prompts=* | --best_of_n=* | --max_new_tokens=* | --train_batch_size=* | --max_epochs=* | \
            --learning_rate=* | --beta=* | --kldpo_tau=* | --wdpo_rho=* | --seed=*)
            name="${word%%=*}"
            printf -v "${name#--}" '%s' "${word#*=}"
            ;;
        *)
            usage >&2
            echo "error: unknown flag: $word" >&2
            exit 2
            ;;
    esac
done

# One folder, one set of sizes: steps of another set would be refused halfway.
sizes="$prompts $best_of_n $max_new_tokens $train_batch_size $max_epochs $learning_rate $beta $kldpo_tau $wdpo_rho $seed"
if [[ -f "$output_path/sizes" && "$(<"$output_path/sizes")" != "$sizes" ]]; then
    echo "error: $output_path was made with other sizes ($(<"$output_path/sizes")); give another --output_path" >&2
    exit 2
fi
mkdir -p "$output_path"
printf '%s\n' "$sizes" >"$output_path/sizes"

began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - began))"; }

say "environment, embedded models and prompts"
bash "$ROOT/setup.sh" --models=embedded --datasets=embedded
# shellcheck source=src/env.sh
source "$ROOT/src/env.sh"

policy="$ROOT/models/SmolLM2-135M"
sampling=(--dataset="$ROOT/datasets/embedded_prompts" --reward_model="$ROOT/models/ArmoRM-SmolLM2"
    --best_of_n="$best_of_n" --temperature=0.7 --max_new_tokens="$max_new_tokens" --prompt_max_len=256
    --max_prompts="$prompts" --seed="$seed")

say "step 1: sample and score completions of the base model"
bash "$ROOT/generate_completions.sh" --save_path="$output_path/base" --model_path="$policy" "${sampling[@]}"

say "step 2: mix two objectives into preference pairs"
run python "$ROOT/src/generate_preferences.py" --completions="$output_path/base" --output_path="$output_path/preferences" \
    --helpsteer_correctness=0.5 --helpsteer_helpfulness=0.5

runs=("base=$output_path/base")
for method in dpo kldpo wdpo; do
    flags=() micro_batch_size=4
    case "$method" in
        kldpo) flags=(--kldpo_tau="$kldpo_tau") ;;
        wdpo) flags=(--wdpo_rho="$wdpo_rho") micro_batch_size=2 ;;
    esac
    say "step 3: align by $method"
    bash "$ROOT/train_alignment.sh" --model_path="$policy" --dataset_path="$output_path/preferences" \
        --save_path="$output_path/$method" "${flags[@]}" --beta="$beta" --learning_rate="$learning_rate" \
        --train_batch_size="$train_batch_size" --micro_batch_size="$micro_batch_size" --max_epochs="$max_epochs" --max_len=512 \
        --gradient_checkpointing=false --save_resume=false --seed="$seed"
    checkpoint="$(find "$output_path/$method" -maxdepth 1 -name 'global_step_*' | sort -V | tail -n 1)"
    say "step 4: sample and score with the $method checkpoint"
    bash "$ROOT/generate.sh" --only_test=true --save_path="$output_path/$method/completions" --model_path="$checkpoint" \
        "${sampling[@]}"
    runs+=("$method=$output_path/$method/completions")
done

say "step 4: compare"
run python "$ROOT/src/evaluate_armorm.py" --runs "${runs[@]}" --output_path="$output_path"
say "done: $output_path/report.md and $output_path/spider.png"
