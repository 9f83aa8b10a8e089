#!/usr/bin/env bash
# The paper's leaderboard experiment: best against worst of ten by ArmoRM's stage-2 score, then the Open LLM Leaderboard v2.
# Ends in <output_path>/report.md. What is done is skipped when the command is given again.
set -euo pipefail
script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
usage: bash experiments/openllm_leaderboard.sh [--tiny] [--slurm] [--NAME=VALUE ...] [-- FLAGS OF train_alignment.sh ...]
  --output_path=outputs/openllm_leaderboard   where everything goes; one folder, one set of flags
  --sizes="1B 3B 8B"               of Llama: models/Llama1b, models/Llama3b, models/Llama8b
  --model_path=                    one model of your own in place of --sizes; its name in tables is --sizes, one word
  --methods=                       of every size, e.g. "DPO KLDPO=0.05 WDPO=0.01", each with its tau or rho (default: the paper's)
                                   1B: DPO KLDPO=0.05 WDPO=0.01; 3B: DPO KLDPO=0.005 WDPO=0.005; 8B: DPO KLDPO=0.005 KLDPO=0.01
  --steps="158 316 474"            checkpoints that are evaluated (2, 4 and 6 epochs of HelpSteer2), or last
  --reward_model=models/ArmoRM
  --dataset=datasets/helpsteer2_prompts
  --best_of_n=10 --temperature=0.7 --max_new_tokens=1024 --prompt_max_len=1024
  --prompts=                       sample only so many prompts of each split
  --beta=0.01 --learning_rate=5e-7 --train_batch_size=128 --max_epochs=8 --max_len=2048 --seed=42
  --tasks=leaderboard --include_path= --backend=hf --batch_size=auto
  --limit=                         only so many samples per task, for a trial
  --max_length= --max_gen_toks=    of the evaluation; the authors ran 2048 and 1024, which cuts contexts
  --tiny=false                     the same chain on the embedded models, small: no GPU, no hub, and, as the leaderboard's data
                                   lie on the hub, two stand-in tasks of a few questions
  --slurm=false                    one job a part (data, training, evaluation, report), each after those that it needs
  --sbatch="--gres=gpu:8 --cpus-per-task=64 --time=24:00:00"
USAGE
}

names=(output_path sizes model_path methods steps reward_model dataset best_of_n temperature max_new_tokens prompt_max_len
    prompts beta learning_rate train_batch_size max_epochs max_len seed tasks include_path backend batch_size limit max_length
    max_gen_toks tiny slurm sbatch)
output_path=outputs/openllm_leaderboard sizes="1B 3B 8B" model_path="" methods="" steps="158 316 474"
best_of_n=10 temperature=0.7 max_new_tokens=1024 prompt_max_len=1024 prompts="" beta=0.01 learning_rate=5e-7
train_batch_size=128 max_epochs=8 max_len=2048 seed=42 tasks=leaderboard include_path="" backend=hf batch_size=auto limit=""
max_length="" max_gen_toks="" tiny=false slurm=false sbatch="--gres=gpu:8 --cpus-per-task=64 --time=24:00:00" part=""
# shellcheck source=experiments/parts.sh
source "$(dirname "$script")/parts.sh"
reward_model="$ROOT/models/ArmoRM" dataset="$ROOT/datasets/helpsteer2_prompts"

# model SIZE: its folder.
model() {
    if [[ -n "$model_path" ]]; then
        echo "$model_path"
        return
    fi
    case "$1" in
        1B | 3B | 8B) echo "$ROOT/models/Llama${1%B}b" ;;
        *) refuse_command "size $1: give of 1B 3B 8B, or a --model_path of your own" ;;
    esac
}

# methods_of SIZE: METHOD or METHOD=VALUE words.
methods_of() {
    if [[ -n "$methods" ]]; then
        echo "$methods"
        return
    fi
    case "$1" in
        3B) echo DPO KLDPO=0.005 WDPO=0.005 ;;
        8B) echo DPO KLDPO=0.005 KLDPO=0.01 ;;
        *) echo DPO KLDPO=0.05 WDPO=0.01 ;;
    esac
}

list_parts() {
    local size word
    for size in $sizes; do
        echo "data/$size"
        echo "evaluate/$size/base"
        for word in $(methods_of "$size"); do
            echo "train/$size/$word"
            echo "evaluate/$size/$word"
        done
    done
    echo report
}

# needs PART: the parts before it, a line each.
# shellcheck disable=SC2329 # submit_parts calls it
needs() {
    local kind size word
    IFS=/ read -r kind size word <<<"$1"
    case "$1" in
        report) list_parts | grep ^evaluate/ ;;
        data/* | evaluate/*/base) ;;
        *) [[ "$kind" == train ]] && echo "data/$size" || echo "train/$size/$word" ;;
    esac
}

# shellcheck disable=SC2329 # run_experiment calls it
do_part() {
    local kind size word
    IFS=/ read -r kind size word <<<"$1"
    case "$kind" in
        data) make_data "$size" ;;
        train) align "$size" "$word" ;;
        evaluate) evaluate "$size" "$word" ;;
        report) make_report ;;
    esac
}

make_data() {
    step bash "$ROOT/generate_completions.sh" --save_path="$output_path/$1/completions" --model_path="$(model "$1")" \
        --dataset="$dataset" --reward_model="$reward_model" --best_of_n="$best_of_n" --temperature="$temperature" \
        --max_new_tokens="$max_new_tokens" --prompt_max_len="$prompt_max_len" ${prompts:+--max_prompts="$prompts"}
    step python "$ROOT/src/generate_preferences.py" --completions="$output_path/$1/completions" \
        --output_path="$output_path/$1/preferences" --ArmoRM=1.0
}

# align SIZE METHOD[=VALUE]
align() {
    local flags=()
    method_flags "${2%%=*}" "${2#*=}"
    step bash "$ROOT/train_alignment.sh" --model_path="$(model "$1")" --dataset_path="$output_path/$1/preferences" \
        --save_path="$output_path/$1/$2" "${flags[@]}" --beta="$beta" --learning_rate="$learning_rate" \
        --train_batch_size="$train_batch_size" --max_epochs="$max_epochs" --max_len="$max_len" --seed="$seed" \
        "${training[@]}" ${further[@]+"${further[@]}"}
}

# evaluate SIZE base|METHOD[=VALUE]: the leaderboard on the model, or on every one of --steps.
evaluate() {
    local number
    if [[ "$2" == base ]]; then
        leaderboard "$(model "$1")" "$output_path/$1/leaderboard/base"
        return
    fi
    for number in $steps; do
        leaderboard "$(checkpoint "$output_path/$1/$2" "$number")" "$output_path/$1/leaderboard/$2/$number"
    done
}

# leaderboard MODEL FOLDER
leaderboard() {
    step bash "$ROOT/openllm_eval.slurm" --model_path="$1" --output_path="$2" --tasks="$tasks" --backend="$backend" \
        --batch_size="$batch_size" --seed="$seed" ${include_path:+--include_path="$include_path"} ${limit:+--limit="$limit"} \
        ${max_length:+--max_length="$max_length"} ${max_gen_toks:+--max_gen_toks="$max_gen_toks"}
}

# shown METHOD[=VALUE]: as the published tables call it.
shown() {
    case "$1" in
        KLDPO=*) echo "KLDPO tau=${1#*=}" ;;
        WDPO=*) echo "WDPO rho=${1#*=}" ;;
        *) echo "$1" ;;
    esac
}

make_report() {
    local size word number runs=()
    for size in $sizes; do
        runs+=("$size/base=$output_path/$size/leaderboard/base")
        for word in $(methods_of "$size"); do
            for number in $steps; do
                runs+=("$size/$(shown "$word") step $number=$output_path/$size/leaderboard/$word/$number")
            done
        done
    done
    run python "$ROOT/src/compare_openllm.py" --runs "${runs[@]}" --output_path="$output_path"
}

# stand_in_tasks FOLDER: two tasks on the questions beside this script, under their absolute path.
stand_in_tasks() {
    local data name
    data="$(python -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$ROOT/experiments/stand_in_questions.jsonl")"
    mkdir -p "$1"
    for name in choice generation; do
        # Whole at once: jobs that begin together write the same.
        sed "s|QUESTIONS|${data//|/\\|}|" "$ROOT/experiments/stand_in_$name.yaml.in" >"$1/.stand_in_$name.$$"
        mv "$1/.stand_in_$name.$$" "$1/stand_in_$name.yaml"
    done
}

parse_flags "$@"
training=()
if [[ "$tiny" == true ]]; then
    default output_path outputs/openllm_leaderboard_tiny
    default sizes tiny
    default model_path "$ROOT/models/SmolLM2-135M"
    default reward_model "$ROOT/models/ArmoRM-SmolLM2"
    default dataset "$ROOT/datasets/embedded_prompts"
    for pair in steps=last best_of_n=4 max_new_tokens=32 prompt_max_len=256 prompts=16 beta=0.1 learning_rate=2e-5 \
        train_batch_size=4 max_epochs=1 max_len=512 batch_size=4 max_gen_toks=16 tasks=stand_in_choice,stand_in_generation; do
        default "${pair%%=*}" "${pair#*=}"
    done
    training=(--micro_batch_size=2 --gradient_checkpointing=false --save_resume=false)
fi
# A wrong word ends here, before anything is made.
read -ra words <<<"$sizes"
[[ -z "$model_path" || ${#words[@]} == 1 ]] ||
    refuse_command "--model_path is one model, but --sizes=$sizes; give it one word, e.g. --sizes=${model_path##*/}"
for size in $sizes; do
    model "$size" >/dev/null
    for word in $(methods_of "$size"); do
        method_flags "${word%%=*}" 0
        [[ "$word" == DPO || "$word" == *=?* ]] || refuse_command "method $word: give its tau or rho, e.g. $word=0.05"
    done
done
settle
if [[ "$tiny" == true ]]; then
    if [[ -z "$part" ]]; then
        bash "$ROOT/setup.sh" --models=embedded --datasets=embedded
        # The environment may be new.
        # shellcheck source=src/env.sh
        source "$ROOT/src/env.sh"
    fi
    if [[ "$tasks" == *stand_in_* && -z "$include_path" ]]; then
        include_path="$output_path/tasks"
        stand_in_tasks "$include_path"
    fi
fi
run_experiment
