"""Fields of others' files that change nothing of what a model computes or of a tokenizer's ids."""


def _words(text: str) -> frozenset[str]:
  return frozenset(text.split())


# Where a configuration came from, how it was trained and generates, and what its heads are called.
CONFIG = _words(
  """
  model_type architectures auto_map _name_or_path name_or_path _commit_hash transformers_version
  torch_dtype dtype transformers.js_config unsloth_version unsloth_fixed is_llama_config
  initializer_range initializer_factor init_std use_cache use_return_dict return_dict
  torchscript output_hidden_states output_attentions output_scores return_dict_in_generate
  output_past gradient_checkpointing pretraining_tp chunk_size_feed_forward
  reorder_and_upcast_attn attn_implementation _attn_implementation _attn_implementation_autoset
  use_bfloat16 xla_device is_decoder tf_legacy_loss use_flash_attn _flash_attn_2_enabled
  tie_encoder_decoder attention_dropout hidden_dropout_prob attention_probs_dropout_prob
  activation_dropout dropout resid_pdrop embd_pdrop attn_pdrop embed_dropout layerdrop
  classifier_dropout qa_dropout seq_classif_dropout hidden_dropout bos_token_id eos_token_id
  pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
  forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens max_length
  min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
  top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
  encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
  exponential_decay_length_penalty cache_implementation num_labels id2label label2id
  problem_type finetuning_task task_specific_params prefix tokenizer_class model_max_length
  max_sequence_length summary_type summary_use_proj summary_activation summary_proj_to_labels
  summary_first_dropout predict_special_tokens pooler_type pooler_fc_size
  pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head directionality
  """
)
# How texts are cut to batches, how ids are decoded, and where a tokenizer came from.
TOKENIZER = _words(
  """
  model_max_length max_len max_length stride truncation_strategy truncation_side padding_side
  padding pad_to_multiple_of pad_token_type_id model_input_names clean_up_tokenization_spaces
  clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
  spaces_between_special_tokens errors legacy use_fast tokenizer_type tokenizer_file vocab_file
  merges_file special_tokens_map_file added_tokens_file name_or_path _commit_hash auto_map
  processor_class backend is_local local_files_only verbose use_default_system_prompt
  sp_model_kwargs response_schema response_template trim_offsets vocab_size device
  model_specific_special_tokens add_special_tokens_in_post transformers_version unk_id
  chat_template_kwargs image_processor_type feature_extractor_type
  """
)
