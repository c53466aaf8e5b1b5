-- One member comes by: the same as Board.meet of citadel_gateway/policy/board.py.
--
-- KEYS: the board.  ARGV: the time, empty for the server's own; the statement as JSON; how many
-- posts there may be.
-- Returns the time, and the news as JSON.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local said, most = cjson.decode(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('GET', KEYS[1])
local board = kept and cmsgpack.unpack(kept) or {version = 0, members = {}, holders = {}, posts = {}}
for member, till in pairs(board.members) do
  if till <= now then board.members[member], board.posts[member] = nil, nil end
end
for task, holder in pairs(board.holders) do
  if holder[2] <= now or holder[1] == said.member then board.holders[task] = nil end
end
local won = {}
if said.lease > 0 then
  board.members[said.member] = now + said.lease
  for _, task in ipairs(said.claims) do
    if not board.holders[task] then board.holders[task] = {said.member, now + said.lease} end
    if board.holders[task][1] == said.member then won[#won + 1] = task end
  end
else
  board.members[said.member], board.posts[said.member] = nil, nil
end
local emptied = said.seen > board.version
local seen = emptied and 0 or said.seen
for _, post in ipairs(said.posts) do
  board.version = board.version + 1
  board.posts[post[1]] = {board.version, post[2]}
end
local count, new = 0, {}
for name, post in pairs(board.posts) do
  count = count + 1
  if post[1] > seen then new[name] = post[2] end
end
while count > most do
  local oldest
  for name, post in pairs(board.posts) do
    if not oldest or post[1] < board.posts[oldest][1] then oldest = name end
  end
  board.posts[oldest] = nil
  count = count - 1
end
local members = 0
for _ in pairs(board.members) do members = members + 1 end
redis.call('SET', KEYS[1], cmsgpack.pack(board), 'EX', 3600)
return {string.format('%.17g', now), cjson.encode({
  version = board.version, members = members, won = won, posts = new, was_emptied = emptied,
})}
