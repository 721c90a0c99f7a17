"""How trainers of language models are known to go wrong in silence, and the tests that show this one does not.

Each line is a way to fail in the words of a user who met it, with the tests that would notice. A test that is renamed or taken
away fails here, so no line can lose its proof unseen. `grep` for a word of the trouble you have.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

LOSS = {
    "micro-batches of unequal length are averaged with equal weight": [
        "objectives/contract.py::test_micro_batches_are_one_batch",
        "runtime/test_processes.py::test_two_processes_compute_what_one_does",
        "runtime/test_two_processes.py::test_sft_lora",
    ],
    "the last, incomplete step of an epoch is scaled down": [
        "objectives/contract.py::test_a_short_last_step_is_divided_by_its_own_rows",
        "runtime/test_two_processes.py::test_a_process_without_rows_takes_part",
    ],
    "the logged loss is not the one that is optimised": [
        "objectives/contract.py::test_the_logged_loss_is_the_loss_that_is_optimised",
        "training/test_accumulation.py::test_evaluation_does_not_depend_on_its_batches",
    ],
    "a model family computes its own loss on another scale": [
        "training/test_accumulation.py::test_a_model_is_never_asked_for_its_own_loss",
    ],
    "rows without a trained token give loss 0 or NaN": [
        "data/test_validation.py::test_rows_without_a_target_stop_and_are_named",
        "data/test_validation.py::test_fully_truncated_rows_stop",
        "data/test_validation.py::test_one_bad_row_among_good_ones",
        "engine/test_logprob.py::test_no_targets_give_a_zero_that_is_attached_to_the_graph",
    ],
    "labels are shifted twice or not at all": [
        "engine/test_layouts.py::test_a_token_is_predicted_from_the_one_before_it",
        "engine/test_layouts.py::test_the_first_token_of_an_answer_is_predicted_from_the_prompts_last",
    ],
    "log-probabilities are computed in bfloat16": [
        "engine/test_logprob.py::test_bf16_log_probabilities_are_summed_in_float32",
        "engine/test_logprob.py::test_value_and_gradient_equal_float64",
    ],
    "the learning rate depends on the number of processes": [
        "runtime/test_processes.py::test_two_processes_compute_what_one_does",
        "optim/test_schedules.py::test_curves_end_where_they_are_told_to",
        "optim/test_schedules.py::test_resuming_anywhere_gives_the_same_rates",
    ],
    "norms, biases or adapters decay by accident": [
        "optim/test_optimizers.py::test_table_of_a_fully_trained_model",
        "optim/test_optimizers.py::test_table_of_an_adapter_has_no_decay_unless_asked",
        "optim/test_optimizers.py::test_off_groups_do_not_decay",
    ],
}
TOKENS = {
    "two beginning-of-text tokens": [
        "data/test_validation.py::test_exactly_one_bos_or_none",
        "data/test_validation.py::test_two_leading_bos_stop",
    ],
    "the end token is never learned where padding is the same token": [
        "data/test_masks.py::test_end_token_is_trained_where_padding_is_the_same_token",
        "data/test_validation.py::test_a_template_without_an_end_token_is_seen",
        "recipes/test_learning.py::test_a_whole_run_learns",
    ],
    "trained spans are found by searching the text": [
        "data/test_masks.py::test_trained_text_is_the_assistant_turns_with_their_ends",
        "data/test_masks.py::test_template_that_rewrites_earlier_turns_stops_and_names_the_turn",
        "data/test_masks.py::test_marks_and_prefixes_agree_on_real_conversations",
    ],
    "answers of a pair are cut out of the rendered string": [
        "data/test_masks.py::test_pairs_share_their_prompt_ids_and_keep_their_answers",
        "data/test_masks.py::test_answer_that_a_template_trims_keeps_its_text",
    ],
    "the prompt's tokens are no prefix of the whole": [
        "data/test_masks.py::test_boundary_moves_into_the_prompt_when_tokens_merge_across_it",
        "data/test_masks.py::test_shorter_common_prefix_of_a_pair_is_the_prompt",
        "data/test_validation.py::test_many_moved_boundaries_stop",
    ],
    "only the last turn is trained, or roles are ignored": [
        "data/test_masks.py::test_masks_by_format",
        "data/test_trl_ids.py::test_assistant_masks",
    ],
    "the template of training is not the one that is served": [
        "data/test_validation.py::test_the_template_is_saved_with_the_tokenizer",
        "interop/test_merged.py::test_the_golden_answer_is_reproduced_from_the_folder_alone",
    ],
    "truncation drops the answer or its end token": [
        "data/test_truncation.py::test_grid_of_pairs",
        "data/test_truncation.py::test_one_answers_length_does_not_cut_the_other",
        "data/test_truncation.py::test_left_truncation_keeps_the_assistant_header_and_the_answer",
        "data/test_truncation.py::test_keep_start_drops_rows_left_without_a_target",
    ],
    "a stale token cache is read": ["data/test_cache.py::test_each_ingredient_misses_and_nothing_else_does"],
    "mixture weights, shuffles and limits do not do what they say": [
        "data/test_mixture.py::test_weights_hold_for_every_stretch_from_the_start",
        "data/test_mixture.py::test_order_is_a_permutation_that_depends_on_seed_and_epoch",
        "data/test_mixture.py::test_limit_is_a_seeded_draw_not_the_first_rows",
    ],
    "the format of a file is guessed wrong": [
        "data/test_formats.py::test_detected_and_converted",
        "data/test_formats.py::test_every_file_kind_gives_the_same_rows",
        "data/test_formats.py::test_damaged_files_say_where",
        "data/test_formats.py::test_unknown_columns_print_the_row_and_the_nearest_mapping",
    ],
}
BATCHES = {
    "packed documents see each other": [
        "engine/test_layouts.py::test_a_neighbour_never_changes_a_document",
        "engine/test_layouts.py::test_packed_and_padded_log_probabilities_equal_separate_documents",
        "engine/test_layouts.py::test_packed_gradients_equal_padded_gradients",
        "engine/test_layouts.py::test_the_first_token_of_a_document_is_never_a_target",
        "contract.py::test_packed_rows_give_the_padded_gradients",
    ],
    "padding changes the result": [
        "engine/test_layouts.py::test_padding_side_and_width_do_not_matter",
        "contract.py::test_generation_with_a_cache_equals_generation_without",
    ],
    "a reward or class is read at the wrong token": [
        "objectives/test_reward.py::test_scores_are_those_of_each_answer_alone",
        "objectives/test_reward.py::test_other_pooling_takes_the_token_before_padding_ids",
        "models/test_native.py::test_classifier_pools_the_last_real_token",
    ],
    "processes get different numbers of batches and wait for ever": [
        "runtime/test_two_processes.py::test_a_process_without_rows_takes_part",
        "runtime/test_two_processes.py::test_every_corner",
    ],
}
PREFERENCES = {
    "policy and reference differ before the first step": [
        "training/test_step_zero.py::test_a_run_writes_what_it_measured",
        "training/test_step_zero.py::test_other_objectives_have_values_of_their_own",
        "training/test_step_zero.py::test_another_reference_stops_the_run_before_it_trains",
        "contract.py::test_dpo_starts_at_log_two_and_its_reference_never_moves",
    ],
    "the reference after fine-tuning an adapter is the base model": [
        "training/test_step_zero.py::test_the_reference_of_a_continued_run_is_its_policy_or_the_base",
        "contract.py::test_dpo_starts_at_log_two_and_its_reference_never_moves",
        "objectives/test_pair_losses.py::test_the_reference_stays_while_the_policy_moves",
    ],
    "dropout is on where policy and reference are compared": [
        "training/test_step_zero.py::test_dropout_in_the_policy_is_noticed",
        "methods/additive/test_adapter.py::test_dropout_acts_in_training_only",
    ],
    "IPO sums where it should average": [
        "objectives/test_ipo.py::test_each_answer_is_divided_by_its_own_length",
        "objectives/test_ipo.py::test_step_zero_is_a_quarter_over_beta_squared",
        "objectives/test_ipo.py::test_loss_and_gradients_equal_the_reference_trainer",
    ],
    "KTO compares a row with itself, or its reference point depends on micro-batches": [
        "objectives/test_kto.py::test_no_row_keeps_its_own_answer",
        "objectives/test_kto.py::test_a_row_with_the_same_prompt_is_passed_over",
        "objectives/test_kto.py::test_reference_point_belongs_to_the_step_not_to_its_micro_batches",
        "objectives/test_kto.py::test_a_negative_reference_point_is_zero_after_the_mean",
        "objectives/test_kto.py::test_a_step_of_one_row_is_refused",
        "objectives/test_kto.py::test_weights_balance_the_classes",
    ],
    "ORPO loses its digits near p = 1, or counts the prompt": [
        "objectives/test_orpo.py::test_log_of_one_minus_p_keeps_its_digits_in_float32",
        "objectives/test_orpo.py::test_loss_and_gradient_are_finite_at_both_ends",
        "objectives/test_orpo.py::test_likelihood_is_a_mean_over_the_tokens_of_the_step",
    ],
    "the first pass over a rollout has a ratio that is not 1": [
        "objectives/test_ppo.py::test_the_first_pass_has_ratio_one_to_the_bit",
        "objectives/test_grpo.py::test_the_first_pass_has_ratio_one_to_the_bit",
        "objectives/test_grpo.py::test_temperature_divides_the_logits",
        "objectives/test_grpo.py::test_sampling_ignores_what_the_checkpoint_says",
    ],
    "padding enters returns, whitening or the mean of a rollout": [
        "objectives/test_ppo.py::test_packed_and_padded_rows_agree",
        "objectives/test_advantages.py::test_four_tokens_by_hand",
        "objectives/test_advantages.py::test_a_rollout_equals_plain_loops",
        "objectives/test_advantages.py::test_whitening_is_over_all_processes",
    ],
    "the reward falls on the wrong token, values are off by one": [
        "objectives/test_advantages.py::test_the_score_is_earned_at_the_end_only",
        "objectives/test_ppo.py::test_an_answer_with_room_earns_its_score_in_the_slot_after_its_end",
        "objectives/test_ppo.py::test_the_value_function_is_asked_before_the_token",
        "objectives/test_grpo.py::test_a_missing_end_replaces_the_score",
    ],
    "PPO runs and does not optimise": ["objectives/test_ppo.py::test_a_bandit_with_one_right_token_is_solved"],
    "value and reward heads are random after loading": [
        "objectives/test_reward.py::test_a_finished_run_gives_the_scores_it_was_left_with",
        "objectives/test_ppo.py::test_a_run_stopped_inside_a_rollout_goes_on_bit_for_bit",
        "models/test_load.py::test_missing_weights_are_refused",
    ],
    "the margin of a reward model has the wrong sign": [
        "objectives/test_reward.py::test_loss_by_hand",
        "objectives/test_reward.py::test_a_constant_changes_nothing_and_swapped_sides_mirror",
    ],
}
WRAPPERS = {
    "a method degenerates because a hook is never called": [
        "methods/reparameterized/test_adalora.py::test_without_its_hook_nothing_is_ever_masked",
        "methods/reparameterized/test_adalora.py::test_the_budget_is_the_cubic_at_every_step_and_masks_keep_exactly_it",
        "methods/selective/test_diff_pruning.py::test_phases_keep_exactly_k_of_the_largest_and_freeze_the_rest",
    ],
    "a method does nothing in a family whose attention never calls it": [
        "methods/test_unrouted_attention.py::test_check_refuses_it",
        "methods/test_unrouted_attention.py::test_train_refuses_it_before_weights_and_leaves_no_folder",
    ],
    "a tensor trains that nothing reads, or a hook is attached that nothing calls": [
        "training/test_first_step.py::test_a_tensor_no_gradient_reaches_stops_the_run",
        "training/test_first_step.py::test_a_hook_that_is_never_called_stops_the_run",
        "training/test_first_step.py::test_one_process_is_enough",
    ],
    "a trained model reads later tokens once it is called outside the trainer": [
        "contract.py::test_a_model_asked_the_plain_way_is_causal_and_is_the_products",
    ],
    "the wrapped model is not the base at the start": [
        "contract.py::test_step_zero_is_the_base_or_the_wrapper_says_it_is_not",
    ],
    "too much or too little trains": [
        "contract.py::test_only_what_is_declared_moves_and_all_of_it_has_gradients",
        "training/test_check.py::test_the_dry_run_counts_what_training_trains",
        "training/test_check.py::test_a_target_that_matches_nothing_names_its_key_and_shows_the_anatomy",
    ],
    "tied embeddings come apart": [
        "methods/reparameterized/test_lora.py::test_merging_one_side_of_a_tied_pair_is_refused_and_both_sides_merge",
        "methods/test_sparse_delta.py::test_tied_embedding_sums_both_uses",
        "models/test_new_token_rows.py::test_starts_as_it_was_and_folds_exactly",
    ],
    "merging changes the answers, above all of quantized models": [
        "contract.py::test_merging_keeps_the_outputs_or_is_refused",
        "interop/test_merged.py::test_a_quantized_base_is_dequantized_to_what_training_saw",
        "interop/test_merged.py::test_a_merge_that_moves_the_logits_is_refused_and_leaves_nothing",
        "interop/test_merged.py::test_a_chain_of_runs_folds_every_stack",
    ],
    "trained tensors are kept in half precision": [
        "contract.py::test_trained_tensors_are_float32",
        "methods/memory/test_nf4.py::test_autocast_decides_the_dtype_of_the_product",
    ],
    "activation checkpointing leaves adapters without gradients": [
        "contract.py::test_checkpointing_changes_no_gradient",
        "models/test_load.py::test_gradient_checkpointing_replays_the_context_and_changes_no_gradient",
    ],
    "masked weights drift by weight decay or momentum": [
        "methods/selective/test_fishmask.py::test_exactly_k_train_and_everything_else_is_bit_equal_after_weight_decay",
        "methods/test_sparse_delta.py::test_frozen_entries_stay_bit_equal_under_weight_decay_and_state_has_the_masks_size",
        "methods/selective/test_fishmask.py::test_resume_keeps_the_mask_and_the_next_step_bit_for_bit",
        "methods/test_selection.py::test_calls_in_chunks_are_one_gradient",
    ],
    "zeroth-order steps do not restore the weights, or processes draw different noise": [
        "methods/memory/test_mezo.py::test_layerwise_restores_bit_for_bit_in_16_bit_with_tied_weights",
        "methods/memory/test_mezo.py::test_two_processes_draw_the_same_noise_and_stay_bit_equal",
        "methods/memory/test_mezo.py::test_the_mean_estimate_points_along_the_gradient",
        "methods/memory/test_mezo.py::test_dropout_is_off_and_the_mode_comes_back",
    ],
    "two methods of one stack fight over a module": [
        "methods/test_pairs.py::test_at_least_85_in_100_pairs_train_and_every_refusal_has_a_reason",
        "methods/test_pairs.py::test_gradients_of_a_pair_equal_float64",
        "runs/test_merge_order.py::test_two_methods_fold_exactly",
        "recipe/test_validate.py::test_an_impossible_stack_is_explained",
    ],
    "evaluation breaks the training of a 4-bit model": [
        "methods/memory/test_nf4.py::test_evaluation_in_the_middle_of_training",
    ],
}
RUNS = {
    "the data order changes when a run is continued": [
        "training/test_resume.py::test_stopping_at_any_step_changes_nothing",
        "training/test_resume.py::test_two_interruptions_are_as_good_as_none",
        "data/test_streaming.py::test_continues_behind_any_row",
    ],
    "state is left out of a checkpoint": [
        "runs/test_checkpoints.py::test_every_optimizer_resumes_to_the_bit",
        "runs/test_checkpoints.py::test_every_random_generator_continues_where_it_was",
        "methods/reparameterized/test_adalora.py::test_a_stopped_run_continues_bit_for_bit_and_shows_its_ranks",
    ],
    "loading a checkpoint runs code": [
        "runs/test_checkpoints.py::test_no_pickle_is_written_or_read",
        "models/test_load.py::test_hostile_pickle_is_never_executed",
        "models/test_load.py::test_an_index_cannot_smuggle_pickles_in",
    ],
    "a half-written checkpoint is taken for a whole one": [
        "runs/test_checkpoints.py::test_kill_at_any_moment_of_a_save_costs_no_good_checkpoint",
        "runs/test_checkpoints.py::test_latest_passes_over_damaged_ones_and_says_so",
        "runs/test_checkpoints.py::test_a_full_disk_is_a_clear_error_and_keeps_the_last_good_one",
    ],
    "every checkpoint holds the frozen base": ["runs/test_checkpoints.py::test_a_checkpoint_weighs_what_trains"],
    "the run ends with its last weights instead of its best": [
        "training/test_best.py::test_a_run_that_gets_worse_ends_with_its_best_weights",
        "training/test_best.py::test_the_best_tracker_by_hand",
        "runs/test_checkpoints.py::test_rotation_keeps_the_newest_and_the_best",
    ],
    "a run is continued under another recipe": ["training/test_resume.py::test_a_changed_recipe_is_refused_and_shown"],
    "the same seed gives another result": [
        "training/test_resume.py::test_the_same_seed_gives_the_same_run_and_another_seed_another",
        "training/test_resume.py::test_evaluating_changes_nothing",
    ],
    "a launcher mangles arguments": ["runtime/test_processes.py::test_arguments_and_exit_codes_travel_unharmed"],
    "N processes train N models": ["runtime/test_processes.py::test_the_silent_failure_of_accelerate_is_caught"],
    "memory is not known before the run": [
        "training/test_memory.py::test_activations_are_estimated_within_15_percent",
        "training/test_memory.py::test_trained_numbers_gradients_and_optimizer_state_are_exact",
    ],
}
RECIPES = {
    "a misspelt key is accepted": [
        "recipe/test_validate.py::test_a_misspelt_key_is_refused_with_the_right_spelling",
        "recipe/test_validate.py::test_half_a_key_is_not_accepted_but_understood",
        "recipe/test_validate.py::test_a_misspelt_override_ends_in_the_same_message",
    ],
    "a key is accepted that nothing reads": [
        "recipe/test_keys_are_read.py::test_every_key_of_the_schema_is_read_by_the_work",
        "recipe/test_keys_are_read.py::test_every_option_of_a_component_is_read",
    ],
    "YAML reads 1e-5 as text and no as false": [
        "recipe/test_yaml_file.py::test_a_scalar_means_what_it_looks_like",
        "recipe/test_validate.py::test_on_and_off_are_text_where_text_is_meant",
        "recipe/test_validate.py::test_a_wrong_value_says_what_is_allowed",
    ],
    "a typo is told after a minute of imports, or hidden behind a missing GPU": [
        "cli/test_command_line.py::test_mistakes_are_told_before_torch_is_imported",
        "golden/test_imports.py::test_a_command_imports_no_new_package",
    ],
    "secrets are printed or stored": [
        "runs/test_secrets.py::test_a_secret_is_in_no_file_and_on_no_screen",
        "runs/test_events.py::test_a_planted_token_is_in_no_event",
    ],
    "code of a checkpoint or data set runs unasked": [
        "models/test_load.py::test_remote_code_is_not_run",
        "models/test_load.py::test_no_recipe_turns_remote_code_or_pickle_on",
    ],
    "a recipe runs and teaches nothing": [
        "recipes/test_learning.py::test_a_whole_run_learns",
        "recipes/test_learning.py::test_its_control_does_not",
    ],
}
EXPORT = {
    "servers refuse the adapter, or it computes something else there": [
        "interop/test_peft.py::test_peft_loads_the_folder_and_gives_the_logits_of_the_run",
        "interop/test_peft.py::test_methods_peft_does_not_have_are_refused_before_anything_is_written",
        "interop/test_peft.py::test_a_transposed_expert_layout_would_be_caught_by_the_proof",
    ],
    "the exported folder answers differently": [
        "interop/test_merged.py::test_a_plain_transformers_load_gives_the_logits_of_the_run",
        "interop/test_merged.py::test_the_golden_answer_is_reproduced_from_the_folder_alone",
    ],
    "what a method learned cannot be loaded again": ["contract.py::test_a_saved_delta_gives_the_same_model_bit_for_bit"],
    "added tokens are never trained": [
        "models/test_load.py::test_added_tokens_grow_the_model",
        "models/test_new_token_rows.py::test_only_the_rows_of_added_tokens_move",
        "models/test_new_token_rows.py::test_a_delta_restores_them",
    ],
}
KNOWN = {**LOSS, **TOKENS, **BATCHES, **PREFERENCES, **WRAPPERS, **RUNS, **RECIPES, **EXPORT}


@functools.cache
def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("failure", KNOWN)
def test_every_known_failure_has_its_proof(failure: str) -> None:
    assert KNOWN[failure]
    for proof in KNOWN[failure]:
        file, _, name = proof.partition("::")
        assert (TESTS / file).is_file(), proof
        assert name in functions_of(TESTS / file), f"{failure}: {proof} is gone"
        marks = [ast.unparse(d) for d in functions_of(TESTS / file)[name].decorator_list]
        assert not any("skip" in mark or "xfail" in mark for mark in marks), f"{proof} is switched off"
