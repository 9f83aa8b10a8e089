#!/usr/bin/env bash
# The paper's ArmoRM experiment: train on mixtures of two objectives, evaluate on all. Ends in <output_path>/report.md.
# Rerunning it skips finished steps.
# shellcheck disable=SC2154,SC2054 # read_flags sets the variables that usage lists; commas in a value
set -euo pipefail

usage() {
    cat <<USAGE
usage: bash experiments/armorm_multi_objective.sh [--tiny] [--slurm] [--NAME=VALUE ...] [-- FLAGS OF train_alignment.sh ...]
  --output_path=outputs/armorm_multi_objective
  --model_path="$ROOT/models/Llama1b"   policy, a Hugging Face folder or hub id
  --reward_model="$ROOT/models/ArmoRM"
  --dataset="$ROOT/datasets/helpsteer2_prompts"
  --mixtures="truthfulness_complexity helpfulness_coherence correctness_helpfulness"
  --methods="DPO WDPO KLDPO"
  --seeds=42                            training seeds, e.g. "42 43 44"; the report pools them
  --step=316                            checkpoint to evaluate (4 epochs of HelpSteer2), or last
  --kldpo_tau=0.05 --wdpo_rho=0.01
  --best_of_n=2 --temperature=0.7 --max_new_tokens=1024 --prompt_max_len=1024
  --eval_best_of_n=10 --eval_temperature=0.1   for the evaluation, of the base model too
  --prompts=                            sample at most this many prompts per split
  --beta=0.01 --learning_rate=5e-7 --train_batch_size=128 --max_epochs=8 --max_len=2048
  --tiny=false                          run on the embedded models at small sizes: no GPU, no hub; other objectives where the
                                        embedded reward model lacks the paper's
  --slurm=false                         submit a job per part (data, trainings, reports), with dependencies
  --sbatch="--gres=gpu:8 --cpus-per-task=64 --time=24:00:00"
USAGE
}

# shellcheck source=experiments/parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
tiny_flags+=(
    --output_path=outputs/armorm_multi_objective_tiny --step=last --eval_best_of_n=2 --eval_temperature=0.7
    --mixtures="overall_complexity overall_coherence correctness_helpfulness"
)
read_flags "$@"

# Each mixture weighs its two objectives equally.
declare -A objectives=(
    [truthfulness_complexity]="ultrafeedback_truthfulness helpsteer_complexity"
    [helpfulness_coherence]="ultrafeedback_helpfulness helpsteer_coherence"
    [correctness_helpfulness]="helpsteer_correctness helpsteer_helpfulness"
    [overall_complexity]="ultrafeedback_overall_score helpsteer_complexity"
    [overall_coherence]="ultrafeedback_overall_score helpsteer_coherence"
)
for mixture in $mixtures; do
    [[ -n "${objectives[$mixture]:-}" ]] || refuse_command "unknown mixture $mixture: choose from ${!objectives[*]}"
done
declare -A method_word=([DPO]=DPO [KLDPO]="KLDPO=$kldpo_tau" [WDPO]="WDPO=$wdpo_rho")
for method in $methods; do
    [[ -n "${method_word[$method]:-}" ]] || refuse_command "unknown method $method: pass DPO, KLDPO or WDPO"
done

# answer FOLDER MODEL: sample and score the test prompts.
answer() {
    sample "$1" "$2" --only_test=true --best_of_n="$eval_best_of_n" --temperature="$eval_temperature"
}

make_data() {
    local mixture first second
    sample "$output_path/base" "$model_path" --best_of_n="$best_of_n" --temperature="$temperature"
    answer "$output_path/base_test" "$model_path"
    for mixture in $mixtures; do
        read -r first second <<<"${objectives[$mixture]}"
        step python "$ROOT/src/generate_preferences.py" --completions="$output_path/base" \
            --output_path="$output_path/$mixture/preferences" "--$first=0.5" "--$second=0.5"
    done
}

# align MIXTURE METHOD SEED: train, then answer the test prompts.
align() {
    local folder="$output_path/$1/$2_seed_$3" found
    train "$folder" "$model_path" "$output_path/$1/preferences" "$3" "${method_word[$2]}"
    found="$(checkpoint "$folder" "$step")"
    answer "$folder/completions" "$found"
}

prepare
part data "" make_data
reports=()
for mixture in $mixtures; do
    needs="" runs=("base=$output_path/base_test")
    for method in $methods; do
        for seed in $seeds; do
            part "$mixture/$method/$seed" data align "$mixture" "$method" "$seed"
            needs+=" $mixture/$method/$seed"
            runs+=("$method=$output_path/$mixture/${method}_seed_$seed/completions")
        done
    done
    part "$mixture" "$needs" step python "$ROOT/src/evaluate_armorm.py" --runs "${runs[@]}" \
        --output_path="$output_path/$mixture/report"
    reports+=("$mixture=$output_path/$mixture/report")
done
part report "$mixtures" step python "$ROOT/src/compare_mixtures.py" --reports "${reports[@]}" --output_path="$output_path"
finish
