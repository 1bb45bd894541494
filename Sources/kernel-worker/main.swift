// The kernel lab's worker: `kernel-worker NAME FORMAT STORE [BASE]` serves /dev/dmu/NAME from an
// image until the device goes. Device 0 of the table is the store, device 1 the base.

import Glibc
import Worker

func complain(_ line: String) {
  let bytes = Array(("kernel-worker: " + line + "\n").utf8)
  // There is nobody else to tell.
  _ = write(2, bytes, bytes.count)
}

let words = Array(CommandLine.arguments.dropFirst())
guard words.count == 3 || words.count == 4 else {
  complain("usage: kernel-worker NAME FORMAT STORE [BASE]")
  exit(2)
}
do throws(WorkerError) {
  try ByNode.run(
    format: words[1], store: words[2], base: words.count == 4 ? words[3] : nil, node: words[0])
} catch {
  complain("\(error)")
  exit(1)
}
