"""The 190 ways in which routers like this one broke for their users, each with the test that would fail; and the tests
of those that no other file has. The numbers are those that docstrings name ("trap 22").

A row with another file's test is not repeated here; that the place exists is tested."""

import json
import re
from pathlib import Path

import pytest

import fake_upstream as fake
import llm_router
from exchanges import (
    PATHS,
    QUICK,
    STAYS_OUT,
    WIRES,
    ask,
    assert_answer,
    assert_tested,
    attempts_of,
    pair_config,
    post,
    until,
)

TRAPS = {
    1: "test_translation.py::test_any_cut_of_the_bytes_gives_the_same_output",
    2: "test_failover.py::test_other_line_ends_and_missing_spaces_are_read_as_well",
    3: "test_failover.py::test_other_line_ends_and_missing_spaces_are_read_as_well",
    4: "test_failover.py::test_an_odd_event_in_a_stream_harms_nothing",
    5: "test_failover.py::test_an_odd_event_in_a_stream_harms_nothing",
    6: "test_translation.py::test_any_cut_of_the_bytes_gives_the_same_output",
    7: "test_sse.py::test_every_cut_of_a_stream_gives_the_same_events",
    8: "test_upstream.py::test_a_single_huge_event_passes_and_one_above_the_limit_is_an_error",
    9: "test_openai_chat.py::test_usage_after_done_is_counted_and_says_nothing",
    10: "test_anthropic_messages.py::test_nothing_follows_the_end",
    11: "test_failover.py::test_a_stream_answer_to_a_plain_request_becomes_one_body",
    12: "test_failover.py::test_a_json_answer_to_a_stream_request_becomes_a_stream",
    13: "test_failover.py::test_an_odd_event_in_a_stream_harms_nothing",
    14: "test_failover.py::test_a_stream_that_fails_after_its_content_ends_in_an_error_and_a_cut",
    15: "test_translation.py::test_usage_chunks_and_empty_choices_are_taken_as_they_come",
    16: "test_openai_chat.py::test_a_first_chunk_without_choices_says_nothing",
    17: "test_openai_chat.py::test_odd_characters_are_escaped",
    18: "test_upstream.py::test_every_way_to_send_a_whole_answer_is_understood",
    19: "test_failover.py::test_a_stream_that_fails_before_its_content_leads_to_the_fallback",
    20: "test_anthropic_messages.py::test_a_stream_that_begins_with_a_tool_call_has_its_message_start",
    21: "test_anthropic_messages.py::test_there_is_one_message_start",
    22: "test_anthropic_messages.py::test_a_block_is_stopped_once",
    23: "test_anthropic_messages.py::test_indices_are_contiguous_whatever_is_left_out",
    24: "test_anthropic_messages.py::test_what_was_left_open_is_closed_at_the_end",
    25: "test_openai_chat.py::test_the_last_fragment_may_ride_with_the_finish_reason",
    26: "test_openai_chat.py::test_content_beside_an_empty_list_of_calls_is_text",
    27: "test_openai_chat.py::test_reasoning_and_text_are_blocks_of_their_own",
    28: "test_anthropic_messages.py::test_text_starts_empty_and_every_piece_is_a_delta",
    29: "test_anthropic_messages.py::test_a_delta_of_another_type_opens_its_own_block",
    30: "test_anthropic_messages.py::test_the_stop_reason_agrees_with_what_was_sent",
    31: "test_anthropic_messages.py::test_the_stop_reason_agrees_with_what_was_sent",
    32: "test_anthropic_messages.py::test_an_empty_text_block_is_never_shown",
    33: "test_openai_chat.py::test_interleaved_calls_come_whole_and_in_order",
    34: "test_openai_chat.py::test_both_calls_of_one_chunk_are_read",
    35: "test_openai_chat.py::test_calls_that_all_bear_index_0_stay_apart",
    36: "test_anthropic_messages.py::test_ids_of_calls_are_there_and_unique",
    37: "test_openai_chat.py::test_a_real_id_after_a_made_up_one_is_the_same_call",
    38: "test_anthropic_messages.py::test_one_id_for_two_calls_becomes_two_ids_with_their_own_results",
    39: "test_openai_chat.py::test_a_name_in_every_chunk_counts_once",
    40: "test_openai_chat.py::test_cumulative_arguments_are_cut_to_what_is_new",
    41: "test_anthropic_messages.py::test_a_tool_without_arguments_has_an_empty_object",
    42: "test_anthropic_messages.py::test_streamed_arguments_begin_like_an_object_or_are_held_and_repaired",
    43: "test_anthropic_messages.py::test_late_usage_is_complete_in_message_delta",
    44: "test_end_to_end.py::test_a_client_of_any_format_gets_the_text_of_an_upstream_of_any_format",
    45: "test_end_to_end.py::test_a_silent_stream_gets_comments_before_its_first_event_and_pings_only_after_message_start",
    46: "test_openai_chat.py::test_a_refusal_is_a_block_and_a_stop_reason",
    47: "test_openai_chat.py::test_finish_reasons_are_mapped",
    48: "test_openai_chat.py::test_think_tags_become_thinking_wherever_they_are_cut",
    49: "test_compatibility.py::test_a_call_written_as_text_stays_text",
    50: "test_openai_chat.py::test_a_second_finish_and_a_delta_after_it_are_merged",
    51: "test_openai_chat.py::test_the_role_is_in_the_first_chunk_only_and_every_index_is_0",
    52: "test_openai_chat.py::test_the_role_is_in_the_first_chunk_only_and_every_index_is_0",
    53: "test_openai_chat.py::test_calls_are_counted_on_their_own_and_never_lack_arguments",
    54: "test_openai_chat.py::test_a_written_stream_reads_as_the_answer_it_was",
    55: "test_anthropic_messages.py::test_an_error_event_fails_the_stream_and_nothing_follows",
    56: "test_openai_chat.py::test_usage_comes_in_a_chunk_of_its_own_and_only_when_asked_for",
    57: "test_openai_chat.py::test_a_ping_is_nothing",
    58: "test_openai_responses.py::test_the_whole_life_cycle_is_told",
    59: "test_openai_responses.py::test_items_are_collected_when_the_final_snapshot_is_empty",
    60: "test_openai_responses.py::test_a_custom_tool_called_as_a_function_comes_back_as_custom_call",
    61: "test_openai_responses.py::test_what_the_deltas_left_out_comes_from_the_done_event",
    62: "test_openai_responses.py::test_a_cut_off_call_never_looks_complete",
    63: "test_compatibility.py::test_a_conversation_that_a_provider_keeps_never_moves_to_another",
    64: "test_compatibility.py::test_reasoning_that_an_upstream_did_not_issue_is_left_out_after_its_refusal_once",
    65: "test_openai_responses.py::test_history_keeps_encrypted_reasoning_but_no_ids_save_of_what_is_open",
    66: "test_openai_chat.py::test_input_stands_for_missing_messages",
    67: "test_compatibility.py::test_cache_control_goes_where_it_is_known_and_nowhere_else",
    68: "test_compatibility.py::test_cache_control_goes_where_it_is_known_and_nowhere_else",
    69: "test_compatibility.py::test_betas_and_cache_scopes_that_a_cloud_refuses_stay_here",
    70: "test_compatibility.py::test_cache_control_goes_where_it_is_known_and_nowhere_else",
    71: "test_compatibility.py::test_a_refused_field_is_left_out_at_once_and_from_then_on",
    72: "test_anthropic_messages.py::test_sampling_fields_go_only_where_they_are_taken",
    73: "test_anthropic_messages.py::test_a_system_message_in_mid_conversation_keeps_its_place",
    74: "test_anthropic_messages.py::test_leading_system_messages_are_lifted_and_later_ones_belong_to_the_user",
    75: "test_openai_chat.py::test_instructions_in_front_are_the_system_and_later_ones_stay",
    76: "test_anthropic_messages.py::test_leading_system_messages_are_lifted_and_later_ones_belong_to_the_user",
    77: "test_anthropic_messages.py::test_tool_results_come_first_in_their_turn",
    78: "test_anthropic_messages.py::test_a_result_without_a_call_becomes_text",
    79: "test_anthropic_messages.py::test_a_call_without_a_result_gets_one",
    80: "test_anthropic_messages.py::test_text_comes_before_the_calls_of_its_turn",
    81: "test_anthropic_messages.py::test_a_second_result_for_one_call_is_dropped",
    82: "test_anthropic_messages.py::test_a_conversation_always_starts_with_the_user_and_has_no_empty_turn",
    83: "test_openai_chat.py::test_content_is_null_only_beside_calls",
    84: "test_openai_chat.py::test_thinking_of_others_and_foreign_blocks_are_dropped_on_turns_without_calls",
    85: "test_compatibility.py::test_reasoning_that_an_upstream_did_not_issue_is_left_out_after_its_refusal_once",
    86: "test_anthropic_messages.py::test_budgeted_thinking_is_off_in_a_tool_turn_that_has_none",
    87: "test_compatibility.py::test_an_upstream_that_wants_its_reasoning_back_gets_it_although_the_client_keeps_none",
    88: "test_anthropic_messages.py::test_thinking_and_effort_are_one_wish",
    89: "test_anthropic_messages.py::test_effort_and_budget_fit_the_model_and_max_tokens",
    90: "test_anthropic_messages.py::test_effort_and_budget_fit_the_model_and_max_tokens",
    91: "test_compatibility.py::test_a_schema_loses_what_strict_upstreams_refuse_and_nothing_else",
    92: "test_compatibility.py::test_a_schema_loses_what_strict_upstreams_refuse_and_nothing_else",
    93: "test_compatibility.py::test_a_schema_loses_what_strict_upstreams_refuse_and_nothing_else",
    94: "test_anthropic_messages.py::test_a_tool_without_parameters_gets_an_object_schema",
    95: "test_translation.py::test_tool_names_are_shortened_in_every_place_and_restored_in_every_answer",
    96: "test_anthropic_messages.py::test_tool_choice_keeps_its_meaning",
    97: "test_anthropic_messages.py::test_tool_choice_keeps_its_meaning",
    98: "test_openai_chat.py::test_tools_are_written_in_openais_form",
    99: "test_anthropic_messages.py::test_a_schema_for_the_answer_is_read_in_both_spellings",
    100: "test_anthropic_messages.py::test_the_small_fields_have_their_places",
    101: "test_anthropic_messages.py::test_the_small_fields_have_their_places",
    102: "test_anthropic_messages.py::test_media_go_as_the_api_takes_them_also_in_tool_results",
    103: "test_anthropic_messages.py::test_media_go_as_the_api_takes_them_also_in_tool_results",
    104: "test_openai_chat.py::test_images_in_results_follow_in_a_user_message",
    105: "test_anthropic_messages.py::test_media_go_as_the_api_takes_them_also_in_tool_results",
    106: "test_anthropic_messages.py::test_a_server_tool_is_kept_for_anthropic_alone",
    107: "test_anthropic_messages.py::test_blocks_only_anthropic_has_are_text_to_others_and_come_back_as_they_were",
    108: "test_compatibility.py::test_a_refused_field_is_left_out_at_once_and_from_then_on",
    109: "test_compatibility.py::test_betas_and_cache_scopes_that_a_cloud_refuses_stay_here",
    110: "test_compatibility.py::test_betas_and_cache_scopes_that_a_cloud_refuses_stay_here",
    111: "test_end_to_end.py::test_every_spelling_of_the_anthropic_path_works",
    112: "test_compatibility.py::test_ollama_is_told_not_to_think_unless_the_client_asked_for_it",
    113: "test_openai_chat.py::test_usage_is_read_in_every_dialect",
    114: "test_anthropic_messages.py::test_usage_is_merged_by_field_and_a_late_zero_hides_nothing",
    115: "test_end_to_end.py::test_count_tokens_is_estimated_whatever_the_upstream_does",
    116: "test_inbound.py::test_the_estimate_counts_everything_around_the_messages_too",
    117: "test_inbound.py::test_the_estimate_errs_high_against_recorded_usage",
    118: "test_end_to_end.py::test_count_tokens_never_touches_health_nor_waits_for_a_silent_upstream",
    119: "test_compatibility.py::test_a_count_of_tokens_is_asked_with_the_client_s_own_thinking",
    120: "test_compatibility.py::test_usage_is_asked_of_every_translated_stream",
    121: "test_failover.py::test_an_invalid_request_keeps_its_status_and_words_in_the_clients_own_format",
    122: "test_failover.py::test_when_nobody_is_left_the_origin_decides_the_status_and_every_attempt_is_told",
    123: "test_outcomes.py::test_what_an_error_says_decides_over_its_status",
    124: "test_openai_chat.py::test_an_error_is_read_in_every_shape",
    125: "test_failover.py::test_when_nobody_is_left_the_origin_decides_the_status_and_every_attempt_is_told",
    126: "test_fallback.py::test_giving_up_tells_the_soonest_recovery_and_nothing_when_there_is_none",
    127: "test_failover.py::test_when_nobody_is_left_the_origin_decides_the_status_and_every_attempt_is_told",
    128: "test_failover.py::test_a_refusal_that_hides_behind_another_status_is_known_by_its_words",
    129: "test_server.py::test_an_error_of_the_routers_own_is_a_500_in_the_clients_format",
    130: "test_failover.py::test_a_stream_that_fails_before_its_content_leads_to_the_fallback",
    131: "test_failover.py::test_comments_and_life_cycle_events_do_not_stop_the_clock_for_the_first_content",
    132: "test_failover.py::test_after_an_early_commit_a_failure_still_falls_back",
    133: "test_failover.py::test_after_an_early_commit_a_failure_still_falls_back",
    134: "test_failover.py::test_a_stream_that_fails_after_its_content_ends_in_an_error_and_a_cut",
    135: "test_failover.py::test_a_stream_that_fails_before_its_content_leads_to_the_fallback",
    136: "test_compatibility.py::test_a_conversation_that_a_provider_keeps_never_moves_to_another",
    137: "test_failover.py::test_a_refused_connection_and_an_unknown_name_lead_to_the_fallback",
    138: "test_failover.py::test_an_empty_answer_leads_to_the_fallback_after_one_call",
    139: "test_failover.py::test_when_every_answer_is_empty_the_empty_answer_is_the_answer",
    140: "test_failover.py::test_empty_answers_touch_nobodys_health",
    141: "test_failover.py::test_what_is_no_answer_leads_to_the_fallback",
    142: "test_failover.py::test_a_retry_after_is_kept_to_exactly",
    143: "test_failover.py::test_a_retry_after_is_kept_to_exactly",
    144: "test_failover.py::test_a_refusal_that_hides_behind_another_status_is_known_by_its_words",
    145: "test_failover.py::test_a_bad_key_benches_the_whole_provider_and_a_rate_limit_only_its_model",
    146: "test_failover.py::test_a_bad_key_benches_the_whole_provider_and_a_rate_limit_only_its_model",
    147: "test_fallback.py::test_a_new_cooldown_never_shortens_an_older_one",
    148: "test_failover.py::test_a_fallback_that_fails_is_remembered_as_well",
    149: "test_failover.py::test_two_failed_requests_open_the_circuit_and_one_probe_closes_it",
    150: "test_failover.py::test_two_failed_requests_open_the_circuit_and_one_probe_closes_it",
    151: "test_fallback.py::test_a_cooling_candidate_goes_last_soonest_back_first_and_is_never_refused",
    152: "test_failover.py::test_two_failed_requests_open_the_circuit_and_one_probe_closes_it",
    153: "test_failover.py::test_an_invalid_request_and_a_missing_model_name_touch_nobodys_health",
    154: "test_fallback.py::test_with_context_fallback_an_overflow_goes_to_larger_windows_only_and_cools_nobody",
    155: "test_outcomes.py::test_what_an_error_says_decides_over_its_status",
    156: "test_failover.py::test_an_invalid_request_comes_back_unchanged_after_one_call",
    157: "test_failover.py::test_comments_and_life_cycle_events_do_not_stop_the_clock_for_the_first_content",
    158: "test_failover.py::test_comments_and_life_cycle_events_do_not_stop_the_clock_for_the_first_content",
    159: STAYS_OUT + "a guard for the throughput of streams; a limit for the whole answer is a setting",
    160: "test_failover.py::test_a_stream_with_a_byte_now_and_then_is_not_cut_by_the_idle_timeout",
    161: "test_server.py::test_when_a_client_leaves_its_upstream_is_closed_at_once",
    162: "test_server.py::test_a_client_that_leaves_harms_nobodys_health",
    163: "test_traps.py::test_one_conversation_after_another_goes_to_the_same_provider",
    164: "test_traps.py::test_one_conversation_after_another_goes_to_the_same_provider",
    165: "test_failover.py::test_a_failure_after_content_is_remembered_and_logged",
    166: "test_failover.py::test_a_candidate_that_cools_is_still_asked_when_nobody_else_is_left",
    167: "test_failover.py::test_an_invalid_request_comes_back_unchanged_after_one_call",
    168: "test_flapping.py::test_three_hundred_clients_each_get_one_right_answer_or_one_clear_error",
    169: "test_traps.py::test_what_is_remembered_of_requests_has_a_limit",
    170: "test_fuzz.py::test_twice_the_input_costs_about_twice_the_steps",
    171: "test_traps.py::test_nothing_of_requests_that_ended_stays_in_memory",
    172: "test_architecture.py::test_importing_the_program_loads_no_module_of_the_world",
    173: "test_faults.py::test_three_hundred_whole_answers_that_take_long_delay_no_other_request_and_hold_no_threads",
    174: "test_traps.py::test_a_large_body_is_parsed_once_and_not_logged",
    175: "test_operations.py::test_the_log_file_is_moved_when_it_is_full_and_private",
    176: "test_operations.py::test_a_detached_server_that_cannot_start_says_why_and_names_who_has_the_port",
    177: "test_lifecycle.py::test_another_program_on_the_port_of_a_dead_instance_is_not_taken_for_it",
    178: "test_files.py::test_broken_json_is_reported_with_its_place_and_never_overwritten",
    179: "test_operations.py::test_a_log_file_that_cannot_be_written_is_said_at_the_start",
    180: "test_secrets.py::test_a_program_under_run_gets_a_key_of_its_own_and_no_other",
    181: "test_config.py::test_broken_json_names_place_line_and_column_and_points_at_it",
    182: "test_outbound.py::test_a_base_url_gets_the_endpoint_and_the_version_only_where_it_has_none",
    183: "test_secrets.py::test_a_secret_is_in_nothing_that_came_out",
    184: "test_upstream.py::test_a_plain_upstream_is_reached_through_the_http_proxy",
    185: "test_server.py::test_an_unknown_path_is_a_404_in_a_fitting_format",
    186: "test_commands.py::test_an_address_that_others_can_reach_needs_auth_or_an_explicit_yes",
    187: "test_incidents.py::test_it_runs_isolated_without_site_packages",
    188: "test_failover.py::test_after_an_early_commit_a_failure_still_falls_back",
    189: "clients/test_run.py::test_the_model_picker_of_claude_code_lists_the_aliases_that_name_claude",
    190: "test_end_to_end.py::test_a_name_with_a_bracketed_suffix_finds_its_model_and_is_echoed",
}


def test_every_trap_names_a_test_that_exists():
    assert_tested(TRAPS, 190)
    assert all("::" in place or place.startswith(STAYS_OUT) for place in TRAPS.values())


@pytest.fixture
def pair(router, make_upstream):
    """A router before two providers, the second one the fallback of the first."""
    first, second = make_upstream(fake.final_text("first")), make_upstream(fake.final_text("second"))
    running = router(pair_config(first, second), *QUICK)
    running.first, running.second = first, second
    return running


@pytest.mark.parametrize("wire", WIRES)
def test_one_conversation_after_another_goes_to_the_same_provider(pair, wire):
    """Traps 163, 164: nothing is spread, so each conversation finds its prompt cache again, whatever its first words and
    its session are; after a failure it comes back."""
    model = "a-%s/to-%s" % (wire, wire)
    for number in range(8):
        headers = {"x-session-id": "s%d" % number, "user-agent": "agent/%d" % number}
        if number == 4:
            pair.first.answer(*[fake.error_answer(wire, 429, "later")])
            assert_answer(wire, post(pair, wire, model, text="words %d" % number, headers=headers), "second")
        reply = post(pair, wire, model, text="words %d" % number, headers=headers)
        assert_answer(wire, reply, "first")
        assert attempts_of(reply) == [(model, "ok")]
    assert (len(pair.first.calls), len(pair.second.calls)) == (9, 1)


def test_what_is_remembered_of_requests_has_a_limit():
    """Trap 169: as long as it runs. The other stores: test_compatibility.py and test_openai_responses.py."""
    ring, metrics = llm_router.TrailRing(10), llm_router.Metrics()
    for number in range(1000):
        trail = llm_router.Trail("req_%d" % number, 0.0, 0.0)
        trail.asked, trail.client = "made-up-%d" % number, "client-%d" % number
        trail.attempts.append(llm_router.Attempt("a/made-up-%d" % number, "openai", "404", "not_found", 0, 1, ""))
        ring.put(trail.id, trail)
        metrics.count(trail, ())
    assert len(ring._entries) == 10 and ring.find("req_0") is None and ring.find("last")["id"] == "req_999"
    assert len(metrics.render({}).split("\n")) < 60 and "made-up" not in metrics.render({})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the memory of a process")
@pytest.mark.parametrize("how", ["refused", "translated", "reset", "unknown", "streamed"])
def test_nothing_of_requests_that_ended_stays_in_memory(pair, how):
    """Trap 171: not even until the cycle collector comes, which is seldom: a body in a cycle is there until then."""

    def resident_mb():
        text = Path("/proc/%d/status" % pair.process.pid).read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", text).group(1)) // 1024

    model, handler, status = {
        "refused": ("a-openai/to-openai", lambda call: fake.error_answer(call.wire, 500, "no"), 500),
        "translated": ("a-anthropic/solo", lambda call: fake.error_answer(call.wire, 500, "no"), 500),
        "reset": ("a-openai/solo", lambda call: fake.reset_before_head(), 502),
        "unknown": ("no/such", None, 404),
        "streamed": ("a-openai/solo", fake.final_text("fine"), 200),
    }[how]
    pair.first.handler = pair.second.handler = handler
    body = json.dumps(ask("openai", model, text="words " * 350_000, stream=how == "streamed")).encode()
    before = 0
    for number in range(30):
        assert pair.post(PATHS["openai"], body).status == status
        before = before or (resident_mb() if number == 5 else 0)
        del pair.first.calls[:], pair.second.calls[:]
    assert resident_mb() - before < 24, "24 requests of 2 MB"


def test_a_large_body_is_parsed_once_and_not_logged(pair, monkeypatch):
    """Trap 174: and what is relayed to an upstream of the client's own format is not written anew."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUJD" * 250_000}}
    body = ask("openai", "a-openai/to-openai", messages=[{"role": "user", "content": [image]}])
    data = json.dumps(body, indent=1).encode()
    assert pair.post(PATHS["openai"], data).status == 200
    assert pair.first.calls[0].body == data.replace(b"a-openai/to-openai", b"to-openai")
    assert until(lambda: any("a-openai/to-openai=ok" in line for line in pair.log()))
    assert max(map(len, pair.log())) < 1000
    parsed, scan = [], llm_router._scan_object
    monkeypatch.setattr(llm_router, "_scan_object", lambda text: parsed.append(1) or scan(text))
    monkeypatch.setattr(llm_router, "load_json", lambda *_: pytest.fail("parsed in another way"))
    inbound = llm_router.read_inbound(llm_router.find_endpoint(PATHS["openai"]), [], data)
    llm_router.replace_model(inbound.body, "to-openai")
    assert len(parsed) == 1
