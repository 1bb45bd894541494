// SPDX-License-Identifier: Apache-2.0
// Real NBD clients as judges: qemu's, libnbd's, fio's.

import Foundation
import Testing
import TestSupport

/// Runs a shell line and returns what it printed; its exit status has to be 0.
@discardableResult
func shell(_ line: String, sourceLocation: SourceLocation = #_sourceLocation) throws -> String {
  let process = Process()
  process.executableURL = URL(fileURLWithPath: "/bin/bash")
  process.arguments = ["-euc", "-o", "pipefail", line]
  let pipe = Pipe()
  process.standardOutput = pipe
  process.standardError = pipe
  try process.run()
  let output = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
  process.waitUntilExit()
  #expect(process.terminationStatus == 0, "\(line)\n\(output)", sourceLocation: sourceLocation)
  return output
}

/// What any server of a disk has to stand, given its URI, a raw file that the disk reads as
/// at the start, and a folder for scratch files. The disk is a multiple of 1 MiB.
struct ClientJudges {
  let uri: String
  let original: String
  let folder: String
  let mebibytes: Int

  func qemu() throws {
    let info = try shell("qemu-img info --output=json '\(uri)'")
    #expect(info.contains("\"virtual-size\": \(mebibytes << 20)"))
    try shell("qemu-img compare -f raw -F raw '\(uri)' '\(original)'")
    try shell("qemu-img map --output=json -f raw '\(uri)'")
    let lines = [
      "write -P 1 0 4k", "write -P 2 1M 1M", "write -P 3 100k 3k", "write -P 4 -f 200k 64k",
      "read -P 1 0 4k", "read -P 2 1M 1M", "read -P 3 100k 3k", "read -P 4 200k 64k",
      "write -z 1088k 128k", "read -P 0 1088k 128k", "read -P 2 1M 64k", "read -P 2 1216k 832k",
      "write -zu 1M 64k", "read -P 0 1M 64k", "write -P 5 777 1111", "read -P 5 777 1111",
      "read -P 1 0 777", "discard 2M 1M", "flush", "aio_write -P 6 3M 64k", "aio_write -P 7 3M 4k",
      "aio_flush", "read -P 7 3M 4k",
    ]
    let output = try shell(
      "qemu-io -f raw " + lines.map { "-c '\($0)'" }.joined(separator: " ") + " '\(uri)'")
    #expect(!output.contains("failed") && !output.contains("error"), "\(output)")
    try shell("qemu-img convert -f raw -O qcow2 '\(uri)' '\(folder)/copy.qcow2'")
    try shell("qemu-img compare -f raw -F qcow2 '\(uri)' '\(folder)/copy.qcow2'")
    // Back again, all of it, with several requests under way and out of order.
    try shell("qemu-img convert -n -W -m 8 -f raw -O raw '\(original)' '\(uri)'")
    try shell("qemu-img compare -f raw -F raw '\(uri)' '\(original)'")
  }

  func libnbd() throws {
    let info = try shell("nbdinfo --json '\(uri)'")
    for word in ["\"can_multi_conn\": true", "\"can_fua\": true", "\"base:allocation\""] {
      #expect(info.contains(word), "\(info)")
    }
    let map = try shell("nbdinfo --map --json '\(uri)'")
    #expect(map.contains("\"offset\": 0"))
    let list = try shell("nbdinfo --list '\(uri)'")
    #expect(list.contains("export-size: \(mebibytes << 20)"))
    try shell("nbdcopy --connections=4 --requests=16 '\(uri)' '\(folder)/out.raw'")
    try shell("cmp '\(folder)/out.raw' '\(original)'")
    let random = "\(folder)/random.raw"
    try shell("dd if=/dev/urandom of='\(random)' bs=1M count=\(mebibytes) status=none")
    try shell("dd if=/dev/zero of='\(random)' bs=1M count=2 seek=1 conv=notrunc status=none")
    try shell("nbdcopy --connections=4 --flush '\(random)' '\(uri)'")
    try shell("nbdcopy --connections=3 '\(uri)' - | cmp - '\(random)'")
    try shell("nbdcopy --connections=4 --flush '\(original)' '\(uri)'")
    try shell("nbdcopy '\(uri)' - | cmp - '\(original)'")
  }

  func fio() throws {
    let common = "--ioengine=nbd --uri='\(uri)' --thread=0 --group_reporting --verify_fatal=1"
    for (rw, sizes) in [
      ("randwrite", "--bsrange=512-64k"), ("randrw", "--bs=4k"), ("write", "--bs=1m"),
    ] {
      try shell(
        """
        cd '\(folder)' && fio --name=verify --rw=\(rw) \(sizes) --iodepth=16 \
        --numjobs=4 --size=\(mebibytes / 4)m --offset_increment=\(mebibytes / 4)m \
        --verify=crc32c --do_verify=1 --randseed=7 \(common)
        """)
    }
  }
}

@Suite(.serialized) struct ClientTests {
  private func judge(_ body: (ClientJudges) throws -> Void) throws {
    let server = try TestServer(size: 32 << 20)
    defer { server.end() }
    let original = server.folder.file("original.raw")
    try shell("cp '\(server.folder.file("base"))' '\(original)' && truncate -s 32M '\(original)'")
    try body(
      ClientJudges(
        uri: server.uri, original: original, folder: server.folder.path, mebibytes: 32))
  }

  @Test func qemu() throws { try judge { try $0.qemu() } }
  @Test func libnbd() throws { try judge { try $0.libnbd() } }
  @Test func fio() throws { try judge { try $0.fio() } }
}
