#!/usr/bin/env bash
# The paper's leaderboard experiment: best against worst of ten by ArmoRM's stage-2 score, then the Open LLM Leaderboard v2.
# Ends in <output_path>/report.md. Rerunning it skips finished steps.
# shellcheck disable=SC2154,SC2054 # read_flags sets the variables that usage lists; commas in a value
set -euo pipefail

usage() {
    cat <<USAGE
usage: bash experiments/openllm_leaderboard.sh [--tiny] [--slurm] [--NAME=VALUE ...] [-- FLAGS OF train_alignment.sh ...]
  --output_path=outputs/openllm_leaderboard
  --sizes="1B 3B 8B"               of Llama: models/Llama1b, models/Llama3b, models/Llama8b
  --model_path=                    your own model instead; --sizes is then its name in the tables
  --methods=                       for every size, with tau or rho, e.g. "DPO KLDPO=0.05 WDPO=0.01" (default: the paper's)
                                   1B: DPO KLDPO=0.05 WDPO=0.01; 3B: DPO KLDPO=0.005 WDPO=0.005; 8B: DPO KLDPO=0.005 KLDPO=0.01
  --steps="158 316 474"            checkpoints to evaluate (2, 4 and 6 epochs of HelpSteer2), or last
  --reward_model="$ROOT/models/ArmoRM"
  --dataset="$ROOT/datasets/helpsteer2_prompts"
  --best_of_n=10 --temperature=0.7 --max_new_tokens=1024 --prompt_max_len=1024
  --prompts=                       sample at most this many prompts per split
  --beta=0.01 --learning_rate=5e-7 --train_batch_size=128 --max_epochs=8 --max_len=2048 --seed=42
  --tasks=leaderboard --include_path= --backend=hf --batch_size=auto
  --limit=                         samples per task, for a trial
  --max_length= --max_gen_toks=    of the evaluation; the authors used 2048 and 1024, which truncates contexts
  --tiny=false                     run on the embedded models at small sizes: no GPU, no hub; two stand-in tasks of a few
                                   questions, because the leaderboard's data is on the hub
  --slurm=false                    submit a job per part (data, training, evaluation, report), with dependencies
  --sbatch="--gres=gpu:8 --cpus-per-task=64 --time=24:00:00"
USAGE
}

# shellcheck source=experiments/parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
tiny_flags+=(
    --output_path=outputs/openllm_leaderboard_tiny --sizes=tiny --steps=last --best_of_n=4 --batch_size=4 --max_gen_toks=16
    --tasks=stand_in_choice,stand_in_generation
)
read_flags "$@"

declare -A llama=([1B]=Llama1b [3B]=Llama3b [8B]=Llama8b)
declare -A paper=([3B]="DPO KLDPO=0.005 WDPO=0.005" [8B]="DPO KLDPO=0.005 KLDPO=0.01")

# model SIZE: print its folder.
model() {
    printf '%s' "${model_path:-$ROOT/models/${llama[$1]}}"
}

# methods_of SIZE: print METHOD or METHOD=VALUE words.
methods_of() {
    printf '%s' "${methods:-${paper[$1]:-DPO KLDPO=0.05 WDPO=0.01}}"
}

[[ -z "$model_path" || "$sizes" != *" "* ]] || refuse_command "--model_path is one model: pass its name as --sizes, e.g. --sizes=mine"
for size in $sizes; do
    [[ -n "$model_path${llama[$size]:-}" ]] || refuse_command "unknown size $size: pass 1B, 3B or 8B, or your own --model_path"
    for word in $(methods_of "$size"); do
        [[ "$word" == DPO || "$word" == KLDPO=?* || "$word" == WDPO=?* ]] ||
            refuse_command "method $word: pass DPO, or KLDPO or WDPO with its tau or rho, e.g. KLDPO=0.05"
    done
done

# make_data SIZE
make_data() {
    sample "$output_path/$1/completions" "$(model "$1")" --best_of_n="$best_of_n" --temperature="$temperature"
    step python "$ROOT/src/generate_preferences.py" --completions="$output_path/$1/completions" \
        --output_path="$output_path/$1/preferences" --ArmoRM=1.0
}

# evaluate FOLDER METHOD[=VALUE]: the leaderboard on each of --steps.
evaluate() {
    local number found
    for number in $steps; do
        found="$(checkpoint "$1/$2" "$number")"
        leaderboard "$found" "$1/leaderboard/$2/$number"
    done
}

# leaderboard MODEL FOLDER
leaderboard() {
    local flags
    collect flags tasks backend batch_size seed include_path limit max_length max_gen_toks
    step bash "$ROOT/openllm_eval.slurm" --model_path="$1" --output_path="$2" "${flags[@]}"
}

prepare
if [[ "$tasks" == *stand_in_* && -z "$include_path" ]]; then
    include_path="$output_path/tasks"
    if [[ -z "$part" ]]; then # lm-eval needs the absolute path of the questions, quoted as in YAML.
        mkdir -p "$include_path"
        questions="'${ROOT//\'/\'\'}/experiments/stand_in_questions.jsonl'"
        for name in choice generation; do
            task="$(<"$ROOT/experiments/stand_in_$name.yaml.in")"
            printf '%s\n' "${task//QUESTIONS/"$questions"}" >"$include_path/stand_in_$name.yaml"
        done
    fi
fi
needs="" runs=()
for size in $sizes; do
    folder="$output_path/$size"
    part "data/$size" "" make_data "$size"
    part "evaluate/$size/base" "" leaderboard "$(model "$size")" "$folder/leaderboard/base"
    needs+=" evaluate/$size/base"
    runs+=("$size/base=$folder/leaderboard/base")
    for word in $(methods_of "$size"); do
        part "train/$size/$word" "data/$size" train "$folder/$word" "$(model "$size")" "$folder/preferences" "$seed" "$word"
        part "evaluate/$size/$word" "train/$size/$word" evaluate "$folder" "$word"
        needs+=" evaluate/$size/$word"
        shown="${word/KLDPO=/KLDPO tau=}" # As in the published tables.
        for number in $steps; do
            runs+=("$size/${shown/WDPO=/WDPO rho=} step $number=$folder/leaderboard/$word/$number")
        done
    done
done
part report "$needs" step python "$ROOT/src/compare_openllm.py" --runs "${runs[@]}" --output_path="$output_path"
finish
