#!/usr/bin/env bash
# Preference shift as in the paper's section 7.1: pairs labelled at one mixture of two objectives, values at all mixtures.
# Ends in <output_path>/report.md and report.png. Rerunning it skips finished runs.
# shellcheck disable=SC2154 # read_flags sets the variables that usage lists
set -euo pipefail

usage() {
    cat <<USAGE
usage: bash experiments/preference_shift.sh [--tiny] [--slurm] [--NAME=VALUE ...] [-- FLAGS OF train_alignment.sh ...]
  --output_path=outputs/preference_shift
  --model_path="$ROOT/models/SmolLM2-135M"   policy, a Hugging Face folder or hub id
  --reward_model="$ROOT/models/ArmoRM-SmolLM2"
  --dataset="$ROOT/datasets/embedded_prompts"
  --objectives="ultrafeedback_overall_score helpsteer_complexity"   r1 and r2
  --alpha=0.1 --scale=8                 pairs are Bradley-Terry draws from scale * r(alpha)
  --forms="linear geometric"            r(alpha) = alpha r1 + (1 - alpha) r2, or r1^alpha r2^(1 - alpha)
  --methods="DPO cDPO DrDPO KLDPO KLDPO-2 WDPO CVaR"   KLDPO-2 is the paper's Algorithm 2
  --geometric_methods="DPO KLDPO WDPO"  those that are also trained on the geometric form
  --seeds="42 43 44 45 46"              of labels, data order and adapters
  --trial_seed=7                        of the trials that choose the strengths
  --best_of_n=12 --max_new_tokens=16 --prompt_max_len=80
  --prompts=                            sample at most this many prompts per split
  --pairs=48 --validation=32 --test=80  prompts for each
  --candidates=12                       answers of a held-out prompt
  --beta=1 --learning_rate=1e-3 --lora_rank=16 --train_batch_size=8 --max_steps=12
  --micro_batch_size=8 --gradient_checkpointing=false
  --curves=42                           seeds whose values are also taken in the middle of training, every --eval_steps
  --eval_steps=3
  --tiny=false                          ten minutes: two methods, two seeds, few prompts
  --slurm=false                         submit a job per run, with dependencies
  --sbatch="--gres=gpu:1 --time=4:00:00"
USAGE
}

# shellcheck source=experiments/parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
tiny_flags=(
    --output_path=outputs/preference_shift_tiny --methods="DPO WDPO" --geometric_methods=DPO --seeds="42 43" --best_of_n=4
    --prompts=24 --pairs=16 --validation=8 --test=16 --candidates=4 --max_steps=2 --eval_steps=1
)
read_flags "$@"

# Two strengths a method, both tried. DPO has none: beta, which all share, limits how far a policy moves.
declare -A trials=([DPO]="" [cDPO]="0.1 0.3" [DrDPO]="1 4" [KLDPO]="0.3 1" [KLDPO-2]="0.3 1" [WDPO]="2e-5 1e-4" [CVaR]="0.5 0.75")
for method in $methods $geometric_methods; do
    [[ -v "trials[$method]" ]] || refuse_command "unknown method $method: choose from ${!trials[*]}"
    [[ " $methods " == *" $method "* ]] || refuse_command "--geometric_methods has $method, which --methods lacks: add it there"
done
[[ " $geometric_methods " == *" DPO "* ]] || refuse_command "DPO is what the others are compared with: add it to both lists of methods"
[[ "$alpha" =~ ^(0|1|0\.[1-9])$ ]] || refuse_command "--alpha=$alpha: pass 0, 0.1, ... or 1"
for form in $forms; do
    [[ "$form" == linear || "$form" == geometric ]] || refuse_command "unknown form $form: pass linear, geometric or both"
done
read -ra both <<<"$objectives"
read -ra all_forms <<<"$forms"
read -ra all_seeds <<<"$trial_seed $seeds"
study=(python "$ROOT/experiments/preference_shift.py")
study_flags=(--folder="$output_path" --objectives "${both[@]}" --prompts "$pairs" "$validation" "$test" --candidates="$candidates"
    --alpha="$alpha")
tried=()
for method in $methods; do
    for strength in ${trials[$method]}; do tried+=("$method=$strength"); done
done

make_data() {
    sample "$output_path/base" "$model_path" --best_of_n="$best_of_n" --temperature=1
    step "${study[@]}" label "${study_flags[@]}" --scale="$scale" --seeds "${all_seeds[@]}" --forms "${all_forms[@]}"
}

# align FOLDER PAIRS SEED METHOD STRENGTH PART: train, and judge on the candidates of PART.
align() {
    local flags references=("$output_path/references/$6" "$output_path/references/$(basename "$2")")
    # The reference is the same for all runs: they share its log-probs. A file that does not match is ignored.
    if [[ ! -d "$1" ]]; then
        mkdir -p "$1" "${references[@]}"
        keep "$1" "${references[0]}"/* "${references[1]}"/*
    fi
    collect flags beta learning_rate lora_rank train_batch_size max_steps micro_batch_size gradient_checkpointing
    ((lora_rank == 0)) || flags+=(--lora_merge=false)
    [[ "$6" != test || " $curves " != *" $3 "* ]] || flags+=(--eval_steps="$eval_steps")
    case "$4" in
        DPO) ;;
        cDPO) flags+=(--label_smoothing="$5") ;;
        DrDPO) flags+=(--drdpo_beta="$5") ;;
        KLDPO) flags+=(--kldpo_tau="$5") ;;
        KLDPO-2) flags+=(--kldpo_tau="$5" --kldpo_normalize=true) ;;
        WDPO) flags+=(--wdpo_rho="$5" --wdpo_prompt=once) ;;
        CVaR) flags+=(--method="cvar:$5") ;;
    esac
    step bash "$ROOT/train_alignment.sh" --model_path="$model_path" --dataset_path="$2" --save_path="$1" --seed="$3" \
        --eval_candidates="$output_path/candidates/$6" --max_test_pairs=4 --save_resume=false --log=none --warmup_ratio=0 \
        "${flags[@]}" "${further[@]}"
    keep "${references[0]}" "$1/reference_candidates.safetensors"
    keep "${references[1]}" "$1"/reference_{train,test}.safetensors
}

# keep FOLDER FILE...: link the files that are there and not yet in the folder. Another job may be doing the same, and what cannot
# be linked is computed again.
keep() {
    local file
    for file in "${@:2}"; do
        [[ ! -e "$file" || -e "$1/${file##*/}" ]] || ln -t "$1" "$file" || true
    done
}

# chosen METHOD: print its strength, which `choose` has written.
chosen() {
    local line
    [[ "$1" != DPO ]] || return 0
    line="$(grep "^$1=" "$output_path/strengths")"
    printf '%s' "${line#*=}"
}

align_chosen() {
    local strength
    strength="$(chosen "$2")"
    align "$output_path/runs/$1/$2_$3" "$output_path/pairs/$1_$3" "$3" "$2" "$strength" test
}

prepare
part data "" make_data
needs=""
for trial in ${tried[@]+"${tried[@]}"}; do
    part "trials/$trial" data align "$output_path/trials/$trial" "$output_path/pairs/${all_forms[0]}_$trial_seed" \
        "$trial_seed" "${trial%%=*}" "${trial#*=}" validation
    needs+=" trials/$trial"
done
part choose "${needs:-data}" step "${study[@]}" choose "${study_flags[@]}" --forms "${all_forms[@]}" --trials ${tried[@]+"${tried[@]}"}
needs=""
for form in $forms; do
    for seed in $seeds; do
        for method in $([[ "$form" == linear ]] && echo "$methods" || echo "$geometric_methods"); do
            part "$form/$method/$seed" choose align_chosen "$form" "$method" "$seed"
            needs+=" $form/$method/$seed"
        done
    done
done
part report "$needs" step "${study[@]}" report "${study_flags[@]}" --scale="$scale" --forms "${all_forms[@]}" \
    --trials ${tried[@]+"${tried[@]}"}
finish
