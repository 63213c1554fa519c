"""The SQL by which workers claim, hold and finish trials."""

import sqlalchemy as sa

RUNNING = """
    SELECT t.trial_id, t.number, l.token, l.worker, l.host, l.boot_id, l.pid_namespace, l.pid, l.pid_started,
           coalesce(l.attempts, 0) AS attempts, coalesce(l.checkpoint_epoch, 0) AS checkpoint_epoch,
           coalesce(l.epoch, 0) AS epoch,
           l.reason, coalesce(l.expires_at < clock_timestamp(), true) AS is_expired
    FROM trials t LEFT JOIN frem_lease l USING (trial_id)
    WHERE t.study_id = :study_id AND t.state = 'RUNNING'
"""
RUNNING_TRIALS = sa.text(RUNNING + "ORDER BY t.number")
RUNNING_TRIAL = sa.text(RUNNING + "AND t.trial_id = :trial_id")
LOCK_STUDY = sa.text("""
    SELECT a.value_json FROM studies s
    LEFT JOIN study_user_attributes a ON a.study_id = s.study_id AND a.key = 'n_trials'
    WHERE s.study_id = :study_id FOR UPDATE OF s
""")
LOCK_LEASE = sa.text("SELECT 1 FROM frem_lease WHERE trial_id = :trial_id FOR UPDATE")
COUNTS = sa.text("""
    SELECT count(*) AS numbers, count(*) FILTER (WHERE state = 'WAITING') AS enqueued
    FROM trials WHERE study_id = :study_id
""")
TAKE = sa.text("""
    INSERT INTO frem_lease (trial_id, study_id, token, worker, host, boot_id, pid_namespace, pid, pid_started, device,
                            attempts, total_attempts, epoch, checkpoint_epoch, taken_at, expires_at)
    VALUES (:trial_id, :study_id, :token, :worker, :host, :boot_id, :pid_namespace, :pid, :pid_started, :device,
            :attempt, 1, 0, 0, now(), clock_timestamp() + make_interval(secs => :lease_s))
    ON CONFLICT (trial_id) DO UPDATE SET
        token = :token, worker = :worker, host = :host, boot_id = :boot_id, pid_namespace = :pid_namespace, pid = :pid,
        pid_started = :pid_started, device = :device, attempts = :attempt,
        total_attempts = frem_lease.total_attempts + 1, reason = NULL, taken_at = now(),
        expires_at = clock_timestamp() + make_interval(secs => :lease_s)
""")
RENEW = sa.text("""
    UPDATE frem_lease SET expires_at = clock_timestamp() + make_interval(secs => :lease_s), epoch = :epoch
    WHERE trial_id = :trial_id AND token = :token
""")
HOLD = sa.text("""
    SELECT l.token = :token AS is_held, l.told_token = :token AS is_told, t.state = 'RUNNING' AS is_running
    FROM frem_lease l JOIN trials t USING (trial_id) WHERE l.trial_id = :trial_id FOR UPDATE OF l
""")
FINISHED = sa.text("""
    SELECT count(*) FROM trials WHERE study_id = :study_id AND state IN ('COMPLETE', 'PRUNED', 'FAIL')
""")
FINISHED_NUMBERS = sa.text("""
    SELECT number FROM trials WHERE study_id = :study_id AND state IN ('COMPLETE', 'PRUNED', 'FAIL')
""")
RANKING = sa.text("""
    SELECT t.number FROM trials t JOIN trial_values v USING (trial_id)
    WHERE t.study_id = :study_id AND t.state = 'COMPLETE' ORDER BY v.value DESC, t.number LIMIT :most
""")
RELEASE = sa.text("""
    UPDATE frem_lease SET token = NULL, reason = :reason, attempts = greatest(attempts - :forgiven, 0)
    WHERE trial_id = :trial_id AND token = :token
""")
CHECKPOINTED = sa.text("""
    UPDATE frem_lease SET attempts = 0, checkpoint_epoch = :epoch, epoch = :epoch
    WHERE trial_id = :trial_id AND checkpoint_epoch < :epoch
""")
RESUMED = sa.text("""
    UPDATE frem_lease SET attempts = CASE WHEN checkpoint_epoch < :epoch THEN 1 ELSE attempts END,
        checkpoint_epoch = :epoch, epoch = :epoch
    WHERE trial_id = :trial_id AND token = :token
""")
FINISH = sa.text("""
    UPDATE frem_lease SET token = NULL, told_token = :token, reason = NULL, epoch = greatest(epoch, :epoch)
    WHERE trial_id = :trial_id
""")
# As a note does it, which refers to the study's row.
SHARE_STUDY = sa.text("SELECT 1 FROM studies WHERE study_id = :study_id FOR KEY SHARE")
# A note that somebody wrote in the dashboard while the trial was trained stays.
KEEP_NOTE = sa.text("""
    INSERT INTO study_system_attributes (study_id, key, value_json)
    SELECT :study_id, key, value FROM unnest(CAST(:keys AS text[]), CAST(:values AS text[])) AS note (key, value)
    WHERE NOT EXISTS (SELECT FROM study_system_attributes WHERE study_id = :study_id AND key = :version_key)
    ON CONFLICT DO NOTHING
""")
KEEP_CURVE = sa.text("""
    INSERT INTO frem_curve (trial_id, curve) VALUES (:trial_id, :curve)
    ON CONFLICT (trial_id) DO UPDATE SET curve = excluded.curve
""")
