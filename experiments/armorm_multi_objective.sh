#!/usr/bin/env bash
# The paper's ArmoRM experiment: train on a mixture of two objectives, evaluate on all. Ends in <output_path>/report.md.
# What is done is skipped when the command is given again.
set -euo pipefail
script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
usage: bash experiments/armorm_multi_objective.sh [--tiny] [--slurm] [--NAME=VALUE ...] [-- FLAGS OF train_alignment.sh ...]
  --output_path=outputs/armorm_multi_objective   where everything goes; one folder, one set of flags
  --model_path=models/Llama1b      policy, a Hugging Face folder or hub id
  --reward_model=models/ArmoRM
  --dataset=datasets/helpsteer2_prompts
  --mixtures="truthfulness_complexity helpfulness_coherence correctness_helpfulness"
  --methods="DPO WDPO KLDPO"
  --seeds=42                       seeds of the training, e.g. "42 43 44": the report pools them
  --step=316                       the checkpoint that is evaluated (4 epochs of HelpSteer2), or last
  --kldpo_tau=0.05 --wdpo_rho=0.01
  --best_of_n=2 --temperature=0.7 --max_new_tokens=1024 --prompt_max_len=1024
  --eval_best_of_n=10 --eval_temperature=0.1   answers of the evaluation, of the base model too
  --prompts=                       sample only so many prompts of each split
  --beta=0.01 --learning_rate=5e-7 --train_batch_size=128 --max_epochs=8 --max_len=2048
  --tiny=false                     the same chain on the embedded models, small: no GPU, no hub, other objectives where the
                                   embedded reward model lacks the paper's
  --slurm=false                    one job a part (data, every training, report), each after those that it needs
  --sbatch="--gres=gpu:8 --cpus-per-task=64 --time=24:00:00"
USAGE
}

names=(output_path model_path reward_model dataset mixtures methods seeds step kldpo_tau wdpo_rho best_of_n temperature
    eval_best_of_n eval_temperature max_new_tokens prompt_max_len prompts beta learning_rate train_batch_size max_epochs max_len tiny slurm sbatch)
output_path=outputs/armorm_multi_objective mixtures="truthfulness_complexity helpfulness_coherence correctness_helpfulness"
methods="DPO WDPO KLDPO" seeds=42 step=316 kldpo_tau=0.05 wdpo_rho=0.01 best_of_n=2 temperature=0.7 eval_best_of_n=10 eval_temperature=0.1
max_new_tokens=1024 prompt_max_len=1024 prompts="" beta=0.01 learning_rate=5e-7 train_batch_size=128 max_epochs=8 max_len=2048
tiny=false slurm=false sbatch="--gres=gpu:8 --cpus-per-task=64 --time=24:00:00" part=""
# shellcheck source=experiments/parts.sh
source "$(dirname "$script")/parts.sh"
model_path="$ROOT/models/Llama1b" reward_model="$ROOT/models/ArmoRM" dataset="$ROOT/datasets/helpsteer2_prompts"

# objectives MIXTURE: its two objectives, weighted 1/2 each.
objectives() {
    case "$1" in
        truthfulness_complexity) echo ultrafeedback_truthfulness helpsteer_complexity ;;
        helpfulness_coherence) echo ultrafeedback_helpfulness helpsteer_coherence ;;
        correctness_helpfulness) echo helpsteer_correctness helpsteer_helpfulness ;;
        overall_complexity) echo ultrafeedback_overall_score helpsteer_complexity ;;
        overall_coherence) echo ultrafeedback_overall_score helpsteer_coherence ;;
        *) refuse_command "mixture $1: give of truthfulness_complexity helpfulness_coherence correctness_helpfulness overall_complexity overall_coherence" ;;
    esac
}

list_parts() {
    local mixture method seed
    echo data
    for mixture in $mixtures; do
        for method in $methods; do
            for seed in $seeds; do
                echo "$mixture/$method/$seed"
            done
        done
    done
    echo report
}

# needs PART: the parts before it, a line each.
# shellcheck disable=SC2329 # submit_parts calls it
needs() {
    case "$1" in
        data) ;;
        report) list_parts | grep / ;;
        *) echo data ;;
    esac
}

# shellcheck disable=SC2329 # run_experiment calls it
do_part() {
    case "$1" in
        data) make_data ;;
        report) make_report ;;
        *) IFS=/ read -r mixture method seed <<<"$1" && align "$mixture" "$method" "$seed" ;;
    esac
}

make_data() {
    local mixture first second
    step bash "$ROOT/generate_completions.sh" --save_path="$output_path/base" --model_path="$model_path" "${sampling[@]}" \
        --best_of_n="$best_of_n" --temperature="$temperature"
    answer "$output_path/base_test" "$model_path"
    for mixture in $mixtures; do
        read -r first second < <(objectives "$mixture")
        step python "$ROOT/src/generate_preferences.py" --completions="$output_path/base" \
            --output_path="$output_path/$mixture/preferences" "--$first=0.5" "--$second=0.5"
    done
}

# answer FOLDER MODEL: sample and score the test prompts, for the evaluation.
answer() {
    step bash "$ROOT/generate_completions.sh" --only_test=true --save_path="$1" --model_path="$2" "${sampling[@]}" \
        --best_of_n="$eval_best_of_n" --temperature="$eval_temperature"
}

# align MIXTURE METHOD SEED: train, then sample and score the test prompts.
align() {
    local folder="$output_path/$1/$2_seed_$3" value=$wdpo_rho flags=() chosen
    [[ "$2" != KLDPO ]] || value=$kldpo_tau
    method_flags "$2" "$value"
    step bash "$ROOT/train_alignment.sh" --model_path="$model_path" --dataset_path="$output_path/$1/preferences" \
        --save_path="$folder" "${flags[@]}" "${training[@]}" --seed="$3" ${further[@]+"${further[@]}"}
    chosen="$(checkpoint "$folder" "$step")"
    answer "$folder/completions" "$chosen"
}

make_report() {
    local mixture method seed first second runs reports=()
    for mixture in $mixtures; do
        runs=("base=$output_path/base_test")
        for method in $methods; do
            for seed in $seeds; do
                runs+=("$method=$output_path/$mixture/${method}_seed_$seed/completions")
            done
        done
        read -r first second < <(objectives "$mixture")
        run python "$ROOT/src/evaluate_armorm.py" --runs "${runs[@]}" --output_path="$output_path/$mixture/report" \
            --trained_on "$first" "$second" --sweep "$first" "$second"
        reports+=("$mixture=$output_path/$mixture/report")
    done
    run python "$ROOT/src/compare_mixtures.py" --reports "${reports[@]}" --output_path="$output_path"
}

parse_flags "$@"
training=()
if [[ "$tiny" == true ]]; then
    default output_path outputs/armorm_multi_objective_tiny
    default model_path "$ROOT/models/SmolLM2-135M"
    default reward_model "$ROOT/models/ArmoRM-SmolLM2"
    default dataset "$ROOT/datasets/embedded_prompts"
    default mixtures "overall_complexity overall_coherence correctness_helpfulness"
    for pair in step=last eval_best_of_n=2 eval_temperature=0.7 max_new_tokens=32 prompt_max_len=256 prompts=16 beta=0.1 learning_rate=2e-5 train_batch_size=4 \
        max_epochs=1 max_len=512; do
        default "${pair%%=*}" "${pair#*=}"
    done
    training=(--micro_batch_size=2 --gradient_checkpointing=false --save_resume=false)
fi
# A wrong word ends here, before anything is made.
for mixture in $mixtures; do objectives "$mixture" >/dev/null; done
for method in $methods; do method_flags "$method" 0; done
settle
training+=(--beta="$beta" --learning_rate="$learning_rate" --train_batch_size="$train_batch_size" --max_epochs="$max_epochs"
    --max_len="$max_len")
sampling=(--dataset="$dataset" --reward_model="$reward_model"
    --max_new_tokens="$max_new_tokens" --prompt_max_len="$prompt_max_len" ${prompts:+--max_prompts="$prompts"})
if [[ "$tiny" == true && -z "$part" ]]; then
    bash "$ROOT/setup.sh" --models=embedded --datasets=embedded
    # The environment may be new.
    # shellcheck source=src/env.sh
    source "$ROOT/src/env.sh"
fi
run_experiment
