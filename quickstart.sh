#!/usr/bin/env bash
# All steps on the embedded models: no GPU, no login. Ends in <output_path>/report.md and spider.png.
# Rerunning it skips finished steps.
# shellcheck disable=SC2154 # the variables of the usage
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    cat <<'USAGE'
usage: bash quickstart.sh [--NAME=VALUE ...]
  --output_path=outputs/quickstart   where everything goes
  --prompts=48          train prompts, and as many test prompts; those longer than --prompt_max_len are omitted
  --prompt_max_len=64   longest prompt in tokens
  --best_of_n=6         completions per prompt
  --max_new_tokens=24   longest completion in tokens
  --temperature=1.2     sampling temperature, before and after training
  --pairs_per_prompt=2  preference pairs per prompt, those with the largest margins
  --train_batch_size=8  pairs per optimizer step, a multiple of 8
  --max_steps=10        optimizer steps
  --learning_rate=2e-3  of the LoRA adapters
  --lora_rank=16        0 trains all weights; use a tenth of the learning rate then
  --beta=0.1            KL penalty coefficient (the paper's 0.01 needs more steps)
  --kldpo_tau=1
  --wdpo_rho=0.002
  --seed=42             seed of sampling, data order and adapters
USAGE
}

# A variable for every flag of the usage, with its default.
names=()
while IFS="=" read -r name value; do
    names+=("$name")
    printf -v "$name" '%s' "$value"
done < <(usage | sed -nE 's/^  --([a-z_]+=[^ ]+).*/\1/p')
for word in "$@"; do
    name="${word%%=*}" name="${name#--}"
    if [[ "$word" == -h || "$word" == --help ]]; then
        usage
        exit
    elif [[ "$word" == --*=* && " ${names[*]} " == *" $name "* ]]; then
        printf -v "$name" '%s' "${word#*=}"
    else
        usage >&2
        echo "error: unknown flag: $word" >&2
        exit 2
    fi
done

# Stop here if the folder has results from different flags: a later step would refuse them.
flags=""
for name in "${names[@]:1}"; do
    flags+="--$name=${!name} "
done
if [[ -f "$output_path/flags" && "$(<"$output_path/flags")" != "$flags" ]]; then
    echo "error: $output_path has results from different flags ($(<"$output_path/flags")); choose another --output_path" >&2
    exit 2
fi
mkdir -p "$output_path"
printf '%s\n' "$flags" >"$output_path/flags"

# say TITLE: print the heading of a step and record its start time.
began=$SECONDS
say() {
    printf '\n== %s (%d s)\n' "$1" "$((SECONDS - began))"
    printf '%d\t%s\n' "$((SECONDS - began))" "$1" >>"$output_path/times.tsv"
}
: >"$output_path/times.tsv"

say "environment, embedded models and prompts"
[[ -n "${CONTAINER:-}" ]] || bash "$ROOT/setup.sh" --models=embedded --datasets=embedded # In an image env.sh starts this again.
# shellcheck source=src/env.sh
source "$ROOT/src/env.sh"
export DRDPO_PROCESSES="${DRDPO_PROCESSES:-1}" # Too little work for several GPUs.

cat <<PLAN

SmolLM2-135M answers $prompts train and $prompts test prompts, $best_of_n times each; a small reward model scores the answers; the
mixture of two scores, coherence and correctness, makes preference pairs; DPO, KLDPO and WDPO train on the same pairs; each
trained model answers the test prompts, and the report compares them with the untrained one. Rerunning skips finished steps.
PLAN
python "$ROOT/benchmarks/quickstart.py" --estimate=true

policy="$ROOT/models/SmolLM2-135M"
sampling=(--dataset="$ROOT/datasets/embedded_prompts" --reward_model="$ROOT/models/ArmoRM-SmolLM2"
    --best_of_n="$best_of_n" --temperature="$temperature" --max_new_tokens="$max_new_tokens" --prompt_max_len="$prompt_max_len"
    --max_prompts="$prompts" --seed="$seed")

say "step 1: sample and score answers of the untrained model"
bash "$ROOT/generate_completions.sh" --save_path="$output_path/base" --model_path="$policy" "${sampling[@]}"

say "step 2: mix two objectives into preference pairs"
run python "$ROOT/src/generate_preferences.py" --completions="$output_path/base" --output_path="$output_path/preferences" \
    --selection=all_pairs --max_pairs_per_prompt="$pairs_per_prompt" --min_margin=1 \
    --helpsteer_coherence=0.5 --helpsteer_correctness=0.5

runs=("base=$output_path/base")
for method in dpo kldpo wdpo; do
    # WDPO counts the prompt once, as in the paper's formula: a third fewer tokens.
    case "$method" in
        dpo) own=() ;;
        kldpo) own=(--kldpo_tau="$kldpo_tau") ;;
        wdpo) own=(--wdpo_rho="$wdpo_rho" --wdpo_prompt=once) ;;
    esac
    say "step 3: train by $method"
    if [[ "$method" != dpo && ! -d "$output_path/$method" ]]; then
        # Same frozen reference, same pairs: reuse its log-probs. A file that does not match is ignored.
        mkdir "$output_path/$method"
        cp "$output_path/dpo/"reference_*.safetensors "$output_path/$method"
    fi
    bash "$ROOT/train_alignment.sh" --model_path="$policy" --dataset_path="$output_path/preferences" \
        --save_path="$output_path/$method" "${own[@]}" --beta="$beta" --learning_rate="$learning_rate" \
        --lora_rank="$lora_rank" --train_batch_size="$train_batch_size" --micro_batch_size=8 --max_steps="$max_steps" --max_len=256 \
        --max_test_pairs=4 --warmup_ratio=0 --gradient_checkpointing=false --save_resume=false --log=none --seed="$seed"
    say "step 4: sample and score answers of the $method model"
    bash "$ROOT/generate_completions.sh" --only_test=true --save_path="$output_path/$method/completions" \
        --model_path="$output_path/$method/global_step_$max_steps" "${sampling[@]}"
    runs+=("$method=$output_path/$method/completions")
done

say "step 4: compare"
run python "$ROOT/src/evaluate_armorm.py" --runs "${runs[@]}" --output_path="$output_path"
say "done: $output_path/report.md and $output_path/spider.png"
